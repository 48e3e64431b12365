"""Toy targets: what their truth is, and that a hidden identity changes nothing."""

import pytest
import torch

from eigendecomp.targets.toys import circuits, groups, squares, tms


def small(features: int = 4, hidden: int = 3) -> tms.TMS:
    torch.manual_seed(0)
    model = tms.TMS(features, hidden, tied=False)
    assert model.W_out is not None
    with torch.no_grad():
        model.W_in.copy_(torch.randn(features, hidden))
        model.W_out.copy_(model.W_in.T + 0.1 * torch.randn(hidden, features))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_hidden_identity_is_the_same_function(tied: bool) -> None:
    model = small()
    if tied:
        model = tms.TMS(4, 3, tied=True)
        torch.nn.init.normal_(model.W_in)
    x = torch.rand(7, 4)
    made = tms.with_identity(model)
    torch.testing.assert_close(made(x), model(x))
    assert [stage.name for stage in made.stages()] == ["W_in", "H", "W_out"]
    assert "H" in tms.truth(made).objects and "H" not in tms.truth(model).objects


def test_the_truth_of_superposition_has_rank_one_in_every_matrix() -> None:
    model = small()
    assert model.W_out is not None
    truth = tms.truth(tms.with_identity(model)).objects
    for feature in range(4):
        reach = model.W_in[feature] @ model.W_out[:, feature]
        alone = torch.zeros(4)
        alone[feature] = 1
        torch.testing.assert_close(truth["W_in"][feature], reach * torch.outer(alone, model.W_out[:, feature]))
        torch.testing.assert_close(truth["W_out"][feature], reach * torch.outer(model.W_in[feature], alone))
        torch.testing.assert_close(
            truth["H"][feature], reach * torch.outer(model.W_in[feature], model.W_out[:, feature])
        )


def test_circuits_share_the_output_weights() -> None:
    model, a, share = circuits.train(4, 3, seed=0, steps=300)
    assert a.shape == (4, 4) and a.min() >= 0 and a.max() <= 3 and share > 0.5
    truth, reach = circuits.truth(model).objects, circuits.reach(model)
    open_ = (model(torch.eye(4)) > 0).float()
    torch.testing.assert_close(
        truth["W_out"], torch.einsum("fh,fo->fho", model.W_in, reach * open_), atol=1e-5, rtol=1e-4
    )
    x = circuits.data(500, 4, torch.Generator().manual_seed(0))
    assert x.any(1).all()


def test_groups_are_on_together() -> None:
    draw = torch.Generator().manual_seed(0)
    x = groups.data(400, 3, 2, draw)
    assert x.shape == (400, 6) and x.any(1).all()
    assert ((x[:, 0] > 0) == (x[:, 1] > 0)).all()
    one = groups.alone(3, 2, 5, draw)
    assert one.shape == (3, 5, 6) and (one[1, :, :2] == 0).all() and (one[1, :, 2:4] > 0).all()
    model, _, share = groups.train(3, 2, 4, seed=0, steps=300)
    truth = groups.truth(model, 3).objects
    assert share > 0.5 and truth["W_in"].shape == (3, 6, 4)
    assert (truth["W_in"][0, 2:] == 0).all()


def test_squares_are_learned_for_both_signs() -> None:
    draw = torch.Generator().manual_seed(0)
    x = squares.data(1000, 3, draw)
    assert (x < 0).any() and (x > 0).any() and x.any(1).all()
    model, share = squares.train(3, 8, 2, seed=0, steps=600)
    assert share > 0.8
    truth = squares.truth(model).objects
    assert truth["W_0"].shape == (3, 3, 8) and truth["b_2"].shape == (3, 3)
    assert (truth["W_0"][0, 1:] == 0).all()  # the first layer's gradient lies on the feature's own input
