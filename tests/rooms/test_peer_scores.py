"""Scores of peers on known answers: the truth scores one and no errors, chance stays at its floor."""

import math

import torch

import eigendecomp as ed
from eigendecomp.targets.toys import tms
from rooms.peers import scores


def split(weight: torch.Tensor) -> torch.Tensor:
    """One component a feature."""
    return torch.stack([torch.diag(row) @ weight for row in torch.eye(len(weight)).to(weight)])


def test_the_true_split_has_cosine_and_length_one_however_it_is_scaled() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 3)
    truth = split(weight)
    for found in (truth, -3 * truth):
        a = scores.coefficients(found, weight)
        torch.testing.assert_close((a[:, None, None] * found).sum(0), weight, atol=1e-5, rtol=1e-5)
        found = a[:, None, None] * found
        torch.testing.assert_close(scores.largest_cosines(found, weight), torch.ones(6))
        torch.testing.assert_close(scores.own_cosines(found, weight), torch.ones(6))
        torch.testing.assert_close(scores.length_ratios(found, weight), torch.ones(6))


def test_components_drawn_at_random_reach_their_floor_alone() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 40)
    found = torch.randn(5, 5, 40)
    assert scores.largest_cosines(found, weight).mean() < 0.5
    plane = torch.einsum("ci,co->cio", torch.randn(20, 5), torch.randn(20, 2))
    assert scores.largest_cosines(plane, weight[:, :2]).mean() > 0.9  # in two dimensions chance is high


def test_errors_of_importances() -> None:
    eye = torch.eye(4)[:, [2, 0, 3, 1]]
    wide = torch.cat([eye, torch.zeros(4, 3)], 1)
    assert scores.identity_error(eye) == scores.identity_error(wide) == 0
    assert scores.matching(wide).tolist() == [1, 3, 0, 2]
    spoiled = wide.clone()
    spoiled[0, 5], spoiled[1, 3] = 0.15, 0.85  # one too many and one too weak, at a tolerance of 0.1
    assert scores.identity_error(spoiled) == 2 and scores.identity_error(spoiled, 0.2) == 0
    assert scores.identity_error(torch.eye(4)[:, :3]) == 1  # a feature is without a component
    on = torch.zeros(4, 6)
    on[:, 1:3] = 1
    assert scores.dense_error(on, 2) == 0 and scores.dense_error(on, 3) == 1 and scores.dense_error(on, 1) == 4
    assert scores.l0(on) == 2


def test_rows_of_components_and_back() -> None:
    torch.manual_seed(0)
    shapes = {"a": (3, 2), "b": (2, 4)}
    parts = {"a": torch.randn(2, 3, 2), "b": torch.cat([torch.randn(2, 2, 4), torch.zeros(1, 2, 4)])}
    rows = scores.rows_of(parts, shapes)
    assert rows.shape == (4, 14)
    back = scores.parts_of(rows, shapes)
    torch.testing.assert_close(back["a"][:2], parts["a"] / parts["a"].norm(dim=(1, 2), keepdim=True))
    assert (back["a"][2:] == 0).all()
    ci = {"a": torch.eye(2), "b": torch.eye(2, 3)}
    whole = torch.cat([parts["a"].flatten(1), parts["b"][:2].flatten(1)], 1)
    torch.testing.assert_close(scores.joined(parts, ci, shapes), torch.nn.functional.normalize(whole, dim=1))


def test_what_features_own_and_what_is_rebuilt() -> None:
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(9, 4)).Q.T
    gradients = torch.randn(4, 7, 1) * rows.unsqueeze(1)
    found = scores.owned(gradients, scores.dual(rows))
    assert found.owned == 4 and found.owner.tolist() == [0, 1, 2, 3] and found.selectivity.min() > 100
    assert scores.rebuilt(gradients.flatten(0, 1), 3 * rows, 1.0) < 1e-5
    assert scores.alive(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 2.0]])) == 2
    assert math.isclose(scores.stability([rows, rows.flip(0), -rows]), 1, abs_tol=1e-5)
    assert math.isnan(scores.stability([rows]))


def test_the_truth_of_the_pentagon_rebuilds_its_features_gradients() -> None:
    model = tms.TMS(5, 2, tied=False)
    angle = 2 * torch.pi * torch.arange(5) / 5
    with torch.no_grad():
        model.W_in.copy_(torch.stack([angle.cos(), angle.sin()], 1))
        assert model.W_out is not None
        model.W_out.copy_(model.W_in.T)
    truth = tms.truth(model).objects
    found = truth["W_in"] * scores.coefficients(truth["W_in"], model.W_in)[:, None, None]
    torch.testing.assert_close(scores.own_cosines(found.detach(), model.W_in.detach()), torch.ones(5))


def test_refitted_rows_are_the_features_where_learned_ones_are_bent() -> None:
    model, turns = tms.TMS(5, 2, tied=False), torch.arange(5) * 2 * torch.pi / 5
    weight = torch.stack([turns.cos(), turns.sin()], 1)
    with torch.no_grad():
        model.W_in.copy_(weight)
        assert model.W_out is not None
        model.W_out.copy_(weight.T)
        model.b.fill_(-0.31)
    x = tms.data(4000, 5, torch.Generator().manual_seed(0), none_empty=True)
    d = ed.decompose(
        model, x, reference=ed.Mean(), parameters=["W_*"], n_directions=5, sparsity=ed.BatchTopK(0.25), steps=600,
        seed=0, progress=False,
    )  # fmt: skip
    least = [
        scores.own_cosines(scores.signed(scores.parts_of(rows, d.target.shapes)["W_in"], weight), weight).min()
        for rows in (d.decoder.flat(), scores.refitted(d, x))
    ]
    assert least[1] > 0.99 and least[1] >= least[0] - 1e-3
