"""Residual networks: what they compute, what truth they are given, and that a seed decides them."""

import pytest
import torch

from eigendecomp.targets.toys import resid_mlp
from eigendecomp.targets.toys.resid_mlp import ResidMLP

FEW = {"features": 12, "width": 20, "neurons": 5, "steps": 30, "batch_size": 64}


def untrained(kind: resid_mlp.Embedding, layers: int = 3) -> ResidMLP:
    torch.manual_seed(0)
    return ResidMLP(resid_mlp.embedding(kind, 12, 12 if kind == "identity" else 20, 0), 5, layers).double()


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_the_truth_is_the_gradient_of_the_own_output_with_the_feature_on_alone(kind) -> None:
    model = untrained(kind)
    truth = model.truth()
    for feature in (0, 7):
        model.zero_grad()
        model(truth.inputs.double())[feature, feature].backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(truth.objects[name][feature], p.grad)
    assert set(truth.objects) == {name for name, _ in model.named_parameters()}
    assert [name for names in truth.layers.values() for name in names] == list(truth.objects)


def test_the_truth_is_of_rank_one_in_every_tensor_and_the_same_for_every_positive_value() -> None:
    model = untrained("random")
    objects = model.truth().objects
    for part in objects.values():
        s = torch.linalg.svdvals(part)
        assert (s[:, 1] <= 1e-10).all()
    x = torch.zeros(1, 12, dtype=torch.double)
    x[0, 3] = 0.25
    model(x)[0, 3].backward()
    for name, p in model.named_parameters():  # a quarter of the input: W_in's part is a quarter, W_out's too
        torch.testing.assert_close(p.grad, 0.25 * objects[name][3])


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_neuron_contributions_are_derivatives_of_the_output_through_each_neuron(kind) -> None:
    """Σ_j s_j NC_j(i) with gates s is what one layer adds at output i, and NC_j its derivative in the gate."""
    model = untrained(kind, 1)
    nc = model.contributions()
    _, w_in, w_out = model.weights[0]
    gates = torch.ones(5, dtype=torch.double, requires_grad=True)
    for feature in range(12):
        reads = w_in @ model.W_E[feature]
        added = (model.W_E[feature] @ w_out) @ (gates * reads)
        torch.testing.assert_close(nc[feature], torch.autograd.grad(added, gates)[0])
        on = reads > 0
        alone = model.computed(torch.eye(12, dtype=torch.double))[feature, feature]
        torch.testing.assert_close(nc[feature][on].sum(), alone)


def test_contributions_of_the_networks_own_weights_given_as_parts_are_its_own() -> None:
    model = untrained("random")
    parts = {name: p.detach().expand(12, *p.shape) for name, p in model.named_parameters()}
    torch.testing.assert_close(model.contributions(parts), model.contributions())
    first = {name: part for name, part in parts.items() if name.startswith("layers.0")}
    alone = model.contributions(first)
    torch.testing.assert_close(alone[:, :5], model.contributions()[:, :5])
    assert (alone[:, 5:] == 0).all() and alone.shape == (12, 15)


def test_with_an_identity_the_layers_add_what_the_output_has_over_the_input() -> None:
    model = untrained("identity")
    x = torch.rand(4, 12, dtype=torch.double)
    torch.testing.assert_close(model.computed(x), model(x) - x)


def test_training_lowers_the_error_and_the_seed_decides_it() -> None:
    model, missed = resid_mlp.train(2, "identity", seed=3, **{**FEW, "steps": 300})
    again, same = resid_mlp.train(2, "identity", seed=3, **{**FEW, "steps": 300})
    other, _ = resid_mlp.train(2, "identity", seed=4, **{**FEW, "steps": 300})
    assert missed == same < 0.9
    state = model.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    assert not torch.equal(state["layers.0.W_in.weight"], other.state_dict()["layers.0.W_in.weight"])


def test_data_has_no_empty_sample_and_values_of_both_signs() -> None:
    x = resid_mlp.data(500, 100, torch.Generator().manual_seed(0))
    assert x.shape == (500, 100) and (x != 0).any(1).all()
    assert x.min() >= -1 and x.max() <= 1 and (x < 0).any() and (x > 0).any()
    assert 1 <= (x != 0).sum(1).double().mean() < 2


def test_an_identity_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match="as many dimensions"):
        resid_mlp.embedding("identity", 10, 20, 0)
    with pytest.raises(ValueError, match="'identity' or 'random'"):
        resid_mlp.embedding("other", 10, 20, 0)  # type: ignore[arg-type]
