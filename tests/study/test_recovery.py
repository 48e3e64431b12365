"""Recovery scores: the truth itself scores one, random directions low, and what is missing counts as zero."""

import pytest
import torch

import eigendecomp as ed
from eigendecomp.study import floors, recovery
from eigendecomp.study.moves import Move
from eigendecomp.study.recovery import Truth, recovered
from eigendecomp.targets.toys import circuits, groups, resid_mlp, squares, tms
from eigendecomp.targets.toys.resid_mlp import ResidMLP
from rooms import fitting, strengths
from rooms.peers.networks import NETWORKS, weights


@pytest.fixture(scope="module")
def model() -> ResidMLP:
    return resid_mlp.train(2, "identity", seed=0, features=20, neurons=6, steps=600, batch_size=128)[0]


def test_hand_made_directions_that_are_the_truth_score_one(model: ResidMLP) -> None:
    truth = model.truth()
    found = recovered(torch.eye(20), {name: 3 * part for name, part in truth.objects.items()}, truth)
    assert (found.features, found.owned) == (20, 20)
    for scores in (found.mean_cosine, found.least_cosine, found.mean_reader, found.least_reader):
        assert scores == pytest.approx(dict.fromkeys(["layers.0", "layers.1"], 1.0), abs=1e-5)
    assert found.selectivity > 1e6


def test_neither_order_nor_sign_of_directions_matters(model: ResidMLP) -> None:
    truth = model.truth()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    sign = torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0)
    rows = {name: part[order] * sign.view(-1, 1, 1) for name, part in truth.objects.items()}
    straight = recovered(torch.eye(20), truth.objects, truth).row()
    assert recovered(torch.eye(20)[:, order], rows, truth).row() == pytest.approx(straight, abs=1e-5)


def test_contributions_of_a_networks_own_weights_agree_with_themselves(model: ResidMLP) -> None:
    nc = model.contributions()
    torch.testing.assert_close(recovery.agreement(-5 * nc, nc), torch.ones(20))
    assert recovery.agreement(torch.ones_like(nc), nc).max() < 1e-6
    assert recovery.agreement(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), nc).mean() < 0.5


def test_a_feature_without_a_direction_counts_as_zero(model: ResidMLP) -> None:
    truth = model.truth()
    strength = torch.eye(20)
    strength[:, 4] = 0  # a direction that nothing uses
    found = recovered(strength, truth.objects, truth)
    assert found.owned == 19 and found.least_selectivity == 0 and found.least_cosine["layers.0"] == 0
    assert found.mean_cosine["layers.1"] == pytest.approx(19 / 20, abs=1e-5)


def test_directions_in_one_layer_have_no_part_in_the_other(model: ResidMLP) -> None:
    truth = model.truth()
    rows = {name: part for name, part in truth.objects.items() if name.startswith("layers.0")}
    found = recovered(torch.eye(20), rows, truth)
    assert found.mean_cosine["layers.0"] == pytest.approx(1, abs=1e-5) and found.mean_cosine["layers.1"] == 0
    whole = recovered(torch.eye(20), truth.objects, truth)
    assert found.nc is not None and whole.nc is not None and found.nc < whole.nc
    with pytest.raises(ValueError, match="have no part"):
        recovered(torch.eye(20), {"other": torch.zeros(20, 2)}, truth)


def test_a_target_without_neurons_has_no_contributions() -> None:
    objects = {"w": torch.eye(3).unsqueeze(1)}
    found = recovered(torch.eye(3), objects, Truth(torch.eye(3), objects))
    assert found.nc is None and "nc" not in found.row() and found.least_cosine["w"] == pytest.approx(1)


def test_learned_directions_recover_far_more_than_random_ones_and_a_seed_decides_them(model: ResidMLP) -> None:
    x = resid_mlp.data(3000, 20, torch.Generator().manual_seed(1))

    def fit(seed: int) -> ed.Decomposition:
        return ed.decompose(
            model, x, n_directions=30, reference=ed.Mean(), sparsity=ed.BatchTopK(2 / 30), steps=400, batch_size=128,
            seed=seed, progress=False,
        )  # fmt: skip

    d = fit(0)
    learned, truth = recovery.recovery(d, model), model.truth()
    assert learned.row() == recovery.recovery(fit(0), model).row() != recovery.recovery(fit(1), model).row()
    rows = floors.random_directions(d.target.shapes, 30, 1, seed=0)
    dense = {name: rows.dense(name) for name in rows.shapes}
    strength = strengths.random_strength(d, rows, truth)
    torch.testing.assert_close(strengths.dense_strength(d, dense, truth), strength, rtol=1e-3, atol=1e-5)
    random = recovered(strength, dense, truth)
    assert learned.owned >= 18 and learned.nc is not None and random.nc is not None
    assert learned.nc > 0.6 > 2 * random.nc
    assert learned.selectivity > 5 > 2 * random.selectivity


def test_features_have_the_mean_impact_of_their_own_samples_and_the_scores_of_their_own_move(model: ResidMLP) -> None:
    whole = model.truth()
    x = torch.cat([whole.inputs, 0.5 * whole.inputs])
    shown = torch.eye(20, dtype=torch.bool).repeat(1, 2)
    d = fitting.fit(model, 20, seed=0, steps=20)

    def acted(move: Move, feature: int) -> dict[str, float]:
        with move(1.0) as moved:
            change = moved(whole.inputs)[feature, feature] - base[feature, feature]
        return {"even": change.item()} if feature % 2 == 0 else {}

    with torch.no_grad():
        base = model(whole.inputs)
    truth = Truth(x, whole.objects, whole.layers, samples=shown, acted=acted)
    impact = d.impact(x, 4)
    torch.testing.assert_close(recovery.strength(d, truth, 4), (impact[:20] + impact[20:]) / 2)
    found = recovery.recovery(d, truth)
    owner, _ = recovery.owners(recovery.strength(d, truth))
    assert (owner < 0).any()  # such a feature is not moved, and counts all the same
    expected = []
    for feature in range(0, 20, 2):
        with torch.no_grad(), d.perturbed({int(owner[feature]): 1.0} if owner[feature] >= 0 else {0: 0.0}) as moved:
            expected.append((moved(whole.inputs) - base)[feature, feature].item())
    assert found.acted["even"] == pytest.approx(sum(expected) / 10) and found.row()["even"] == found.acted["even"]


@pytest.mark.parametrize("name", ["tms", "identity", "circuits", "groups", "squares"])
def test_one_recovery_scores_every_toy(name: str) -> None:
    model = NETWORKS[name].make()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))).abs())  # all is open
    make = {"circuits": circuits.truth, "groups": lambda m: groups.truth(m, 5), "squares": squares.truth}
    truth = make.get(name, tms.truth)(model)
    found = recovered(torch.eye(len(truth.objects["W_0" if name == "squares" else "W_in"])), truth.objects, truth)
    assert found.features == found.owned == NETWORKS[name].features and found.row()["least_cosine"] > 0.9999
    x = NETWORKS[name].data(64, torch.Generator().manual_seed(0))
    d = ed.decompose(model, x, parameters=weights(model), n_directions=4, steps=3, seed=0, progress=False)
    learned = recovery.recovery(d, truth)
    assert learned.features == found.features and learned.owned <= 4
    assert list(learned.mean_cosine) == weights(model)


def test_principal_parts_are_the_leading_singular_vectors() -> None:
    g = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    parts = strengths.principal_parts(g, 3, {"a": (2, 3), "b": (6,)})
    rows = torch.cat([parts["a"].flatten(1), parts["b"]], 1)
    vh = torch.linalg.svd(g, full_matrices=False).Vh[:3]
    torch.testing.assert_close((rows * vh).sum(1).abs(), torch.ones(3))
