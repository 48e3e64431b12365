"""SPD: masks and losses are their formulas, and the gates' slopes are where they should be."""

import pytest
import torch

from eigendecomp.study.chains import Stage, run
from eigendecomp.study.peers import spd
from eigendecomp.targets.toys import tms


def network() -> tms.TMS:
    model = tms.TMS(3, 2, tied=False)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model


def test_hard_sigmoids_and_their_slopes() -> None:
    x = torch.tensor([-1.0, -1.0, 0.5, 2.0], requires_grad=True)
    low = spd.lower_leaky(x)
    assert low.tolist() == [0, 0, 0.5, 1]
    low.backward(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, -0.01, 1.0, 0.0]))
    torch.testing.assert_close(spd.upper_leaky(x.detach()), torch.tensor([0.0, 0.0, 0.5, 1.01]))


def test_masks_lie_between_the_importance_and_one() -> None:
    g, r = torch.rand(50, 4), torch.rand(50, 4)
    m = spd.stochastic_mask(g, r)
    assert ((m >= g) & (m <= 1)).all()
    torch.testing.assert_close(spd.stochastic_mask(torch.tensor([0.5]), torch.tensor([0.5])), torch.tensor([0.75]))


def test_minimality_is_the_sum_of_powers() -> None:
    g = {"a": torch.tensor([[0.5, 0.0], [1.0, 0.0]]), "b": torch.tensor([[1.0], [0.0]])}
    assert spd.minimality(g, 1).item() == pytest.approx((0.5 + 1 + 1) / 2)
    assert spd.minimality(g, 2).item() == pytest.approx((0.25 + 1 + 1) / 2)


def test_losses_against_their_formulas() -> None:
    torch.manual_seed(0)
    model = network()
    found = spd.SPD(model.stages(), 4, seed=1)
    x = torch.rand(6, 3)
    y = model(x).detach()
    torch.testing.assert_close(found.run(x, {}), y)
    parts = found.components()
    assert model.W_in is not None and model.W_out is not None
    left = (model.W_in - parts["W_in"].sum(0)).square().sum() + (model.W_out - parts["W_out"].sum(0)).square().sum()
    torch.testing.assert_close(found.faithfulness(), left / 12)
    masks = {name: torch.rand(6, 4) for name in ("W_in", "W_out")}
    weight = {name: torch.einsum("nc,cio->nio", mask, parts[name]) for name, mask in masks.items()}
    first = torch.einsum("ni,nio->no", x, weight["W_in"])
    both = torch.relu(torch.einsum("ni,nio->no", first, weight["W_out"]) + model.b)
    torch.testing.assert_close(found.run(x, masks), both)
    alone = [(found.run(x, {name: mask}) - y).square().mean() for name, mask in masks.items()]
    together, layers = found.reconstruction(x, y, masks)
    torch.testing.assert_close(together, (both - y).square().mean())
    torch.testing.assert_close(layers, torch.stack(alone).mean())


def test_gates_read_what_the_target_itself_meets() -> None:
    torch.manual_seed(0)
    model = network()
    found = spd.SPD(model.stages(), 4, seed=1)
    x = torch.rand(5, 3)
    expected = found.of("W_out").gates(run(model.stages()[:1], x))
    torch.testing.assert_close(found.gates(x)["W_out"], expected)
    assert all(((g >= 0) & (g <= 1)).all() for g in found.importance(x).values())


def test_a_run_lowers_the_loss_and_stops_when_it_is_told() -> None:
    torch.manual_seed(0)
    model = network()
    settings = spd.Settings(count=4, steps=60, batch_size=64, learning_rate=1e-2)

    def samples(n: int, draw: torch.Generator) -> torch.Tensor:
        return tms.data(n, 3, draw, none_empty=True)

    done = spd.train(model.stages(), samples, settings, seed=0, every=20, watch=lambda found: {"rows": 1.0})
    assert done.steps == 60 and done.seconds > 0 and done.history[-1]["loss"] < done.history[0]["loss"]
    done = spd.train(model.stages(), samples, settings, seed=0, every=20, stop=lambda row: row["step"] >= 40)
    assert done.steps == 40
    done = spd.train(model.stages(), samples, settings, seed=0, every=20, seconds=0)
    assert done.steps == 20


def test_a_branch_beside_the_stream_is_kept_and_added_back() -> None:
    torch.manual_seed(0)
    w = {
        name: torch.randn(size).double() for name, size in (("a", (4, 3)), ("b", (3, 4)), ("c", (4, 2)), ("d", (2, 4)))
    }
    stages = [
        Stage(name, weight, None, torch.relu, opens=True) if name in "ac" else Stage(name, weight, closes=True)
        for name, weight in w.items()
    ]
    x = torch.randn(7, 4).double()
    middle = x + torch.relu(x @ w["a"]) @ w["b"]
    expected = middle + torch.relu(middle @ w["c"]) @ w["d"]
    found = spd.SPD(stages, 4, seed=1).double()
    torch.testing.assert_close(found.run(x, {}), expected)
    assert not torch.allclose(found.run(x, {name: torch.ones(7, 4).double() for name in w}), expected)
    with torch.no_grad():
        for name, weight in w.items():  # one component a row of the weight, and those that are left over zero
            part, rows = found.of(name), len(weight)
            part.V.copy_(torch.eye(rows, 4).double())
            part.U.copy_(torch.cat([weight, torch.zeros(4 - rows, weight.shape[1]).double()]))
    torch.testing.assert_close(found.run(x, {name: torch.ones(7, 4).double() for name in w}), expected)
    torch.testing.assert_close(found.gates(x)["c"], found.of("c").gates(middle))
    assert found.faithfulness() < 1e-20
