"""Moves, effects and learned changes, on a small network whose algebra is known."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.study import moves
from eigendecomp.study.moves import LoRA, Probe, Subspace, along, displaced
from eigendecomp.support.examples import as_examples
from eigendecomp.target import Target


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def d(model: nn.Module, x: torch.Tensor) -> ed.Decomposition:
    return ed.decompose(model, x, n_directions=4, steps=30, sparsity=ed.BatchTopK(0.5), progress=False)


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_moves_leave_the_model_bit_identical_even_when_the_body_raises(model, x, d) -> None:
    before = values(model)
    change = {"0.weight": torch.randn(6, 4)}
    for move in (along(d, 1), along(d, {0: 1.0, 2: -2.0}), displaced(model, change)):
        with pytest.raises(RuntimeError, match="on purpose"), move(0.3) as moved:
            assert not all(torch.equal(a, b) for a, b in zip(before, values(moved), strict=True))
            raise RuntimeError("on purpose")
        assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_a_direction_and_its_dense_form_move_the_model_alike(model, x, d) -> None:
    probe = Probe(model, x)
    dense = displaced(model, moves.low_rank(d.decoder, 2))
    torch.testing.assert_close(probe.change(along(d, 2), 0.7), probe.change(dense, 0.7))


def test_displaced_refuses_what_does_not_fit(model) -> None:
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        displaced(model, {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="shape"):
        displaced(model, {"0.weight": torch.zeros(3)})


def test_predicted_effect_is_the_limit_of_the_real_one(model, x, d) -> None:
    model = copy.deepcopy(model).double()
    probe = Probe(model, x.double())
    encoder, decoder = d.encoder.map(torch.Tensor.double), d.decoder.map(torch.Tensor.double)
    exact = ed.Decomposition(Target(model), d.settings, encoder, decoder, d.threshold, d.pool.double(), d.history)
    real = torch.stack([probe.effect(along(exact, v), 1e-6) / 1e-6 for v in range(4)], 1)
    torch.testing.assert_close(moves.predicted(exact, probe), real, rtol=1e-4, atol=1e-6)


def test_effects_are_in_standard_deviations_and_matched_where_asked(model, x, d) -> None:
    probe, on = Probe(model, x), torch.arange(64) < 20
    shift = displaced(model, {"2.bias": torch.tensor([1.0, 0.0, 0.0])})
    spread = (model(x) - model(x).mean(0)).square().sum(-1).mean().sqrt()
    torch.testing.assert_close(probe.effect(shift, 2.0), (2.0 / spread.detach()).expand(64), rtol=1e-4, atol=1e-6)
    assert probe.effect(shift, probe.matched(shift, on, 0.3)[0])[on].mean() == pytest.approx(0.3, rel=1e-3)
    assert probe.selectivity(shift, on, 0.3) == pytest.approx(1.0, rel=1e-3)  # a bias moves all samples alike
    nothing = displaced(model, {"0.weight": torch.zeros(6, 4)})
    with pytest.raises(ValueError, match="no step"):
        probe.matched(nothing, on, 0.3)
    with pytest.raises(ValueError, match="same for all"):
        Probe(model, x[:1].expand(5, 4))


def test_a_gradient_step_is_of_unit_norm_and_lowers_the_loss(model, x) -> None:
    change = moves.gradient(model, x, lambda f: f.square().sum(), ["0.*"])
    assert set(change) == {"0.weight", "0.bias"}
    assert sum(value.square().sum() for value in change.values()) == pytest.approx(1.0, rel=1e-5)
    with torch.no_grad(), displaced(model, change)(1e-3) as moved:
        after = moved(x).square().sum()
    assert after < model(x).square().sum()


def test_moves_of_the_last_bias_add_exactly(model, x) -> None:
    bias = ed.decompose(
        model, x, parameters=["2.bias"], n_directions=2, steps=5, reference=ed.ModelSample(), progress=False
    )
    assert moves.interference(bias, (0, 0.5), (1, -0.2), Probe(model, x)) < 1e-5


def test_tuning_in_a_subspace_finds_the_step_that_was_taken(model, x, d) -> None:
    before = values(model)
    with d.perturbed({1: 0.4, 3: -0.2}) as moved, torch.no_grad():
        goal = moved(x)
    tuned = moves.tune(
        Target(model), Subspace(d, [1, 3]), x, lambda f: (f - goal).square().mean(), steps=400, learning_rate=0.02
    )
    torch.testing.assert_close(tuned.free[0].detach(), torch.tensor([0.4, -0.2]), atol=0.01, rtol=0)
    assert tuned.size == 2
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_tuning_stops_at_success(model, x) -> None:
    target = Target(model)
    for change in (moves.Full(target), LoRA(target, 1, 0)):
        tuned = moves.tune(target, change, x, lambda f: f.square().mean(), until=0.02)
        with moves.displaced(model, tuned.change)(1.0) as moved:
            assert 0.01 < moved(x).square().mean() <= 0.02 + 1e-6
    assert set(tuned.change) == {"0.weight", "2.weight"}  # LoRA leaves the biases
    assert torch.linalg.matrix_rank(tuned.change["0.weight"]) == 1


@pytest.mark.parametrize("first", [1e-3, 1.0, 30.0, -1e-3])
@pytest.mark.parametrize("rises", [lambda s: 2 * s, lambda s: s**3, lambda s: s**0.2, lambda s: s / (1 + s), math.tanh])
def test_the_step_that_has_an_effect_is_found_from_anywhere(rises, first) -> None:
    steps = []

    def measure(step: float) -> torch.Tensor:
        steps.append(step)
        return torch.tensor([rises(abs(step))], dtype=torch.float64)

    found = moves.matched(measure, torch.sum, 0.3, first=first, tolerance=1e-4)
    assert found is not None and found[0] * first > 0 and rises(abs(found[0])) == pytest.approx(0.3, rel=1e-4)
    assert found[1].item() == rises(abs(found[0])) and len(steps) <= 16


def test_the_step_is_found_beyond_a_jump_and_not_where_there_is_none() -> None:
    def size(of) -> float | None:
        found = moves.matched(lambda s: torch.tensor(of(s)), torch.sum, 0.3, largest=100.0)
        return None if found is None else found[0]

    assert size(lambda s: 0.0) is None and size(lambda s: 0.29 * math.tanh(s)) is None
    assert size(lambda s: 0.1 if s < 2 else 5.0) is None  # 0.3 is jumped over
    assert size(lambda s: 0.1 * s if s < 5 else math.nan) == pytest.approx(3.0, rel=0.01)
    assert size(lambda s: 0.0 if s < 1 else 0.1 * s) == pytest.approx(3.0, rel=0.01)


def test_a_probe_among_samples_is_the_same_probe(model, x, d) -> None:
    probe, some = Probe(model, x, moves.probabilities), torch.arange(64) % 3 == 0
    few, move = probe.among(some), along(d, 1)
    torch.testing.assert_close(few.effect(move, 0.4), probe.effect(move, 0.4)[some])
    assert few.unit == probe.unit and len(as_examples(few.inputs)[0]) == int(some.sum())
    again = torch.arange(len(few.base)) < 3
    torch.testing.assert_close(few.among(again).moved(move, 0.4), probe.moved(move, 0.4)[some][:3])
    sequences = nn.Linear(4, 3)
    whole = Probe(sequences, x.view(16, 4, 4))
    change = displaced(sequences, {"bias": torch.tensor([1.0, 0.0, 0.0])})
    held = torch.zeros(64, dtype=torch.bool)
    held[[3, 21, 22]] = True
    part = whole.among(held)
    assert len(as_examples(part.inputs)[0]) == 2
    torch.testing.assert_close(part.base, whole.base[held])
    torch.testing.assert_close(part.moved(change, 0.5), whole.moved(change, 0.5)[held])


def test_a_push_reaches_its_level_and_takes_the_more_selective_way(model, x, d) -> None:
    parts = [Probe(model, part, moves.probabilities) for part in (x[:10], x[10:])]
    on, off = parts[0], {"rest": parts[1]}
    ways = [moves.push(on, off, along(d, 0), 0.1, first=first) for first in (0.1, -0.1)]
    for one, sign in zip(ways, (1, -1), strict=True):
        assert one is not None and one.step * sign > 0
        assert one.on == pytest.approx(0.1, rel=0.01)
        assert moves.total_variation(on, along(d, 0), one.step).mean().item() == pytest.approx(one.on)
        assert one.toward.sum().abs() < 1e-5 and 0 <= one.share(0) <= 1
    best = moves.push_either_way(on, off, along(d, 0), 0.1, by="rest")
    assert best is not None
    assert best.selectivity("rest") == max(one.selectivity("rest") for one in ways if one)
    assert moves.push(on, off, along(d, 0), 0.1, largest=1e-6, first=1e-7) is None
    nothing = displaced(model, {"0.weight": torch.zeros(6, 4)})
    assert moves.push_either_way(on, off, nothing, 0.1, by="rest") is None


@pytest.mark.parametrize("first", [0.1, -0.1])
def test_the_better_sign_counts(model, x, first) -> None:
    probe, on = Probe(model, x, moves.probabilities), x[:, 0] > 0
    forwards = displaced(model, {"0.weight": torch.eye(6, 4)})

    @contextmanager
    def lopsided(delta: float) -> Iterator[nn.Module]:
        """Backwards it moves what all samples have in common."""
        with forwards(delta) if delta > 0 else displaced(model, {"2.bias": torch.tensor([1.0, 0.0, 0.0])})(delta) as m:
            yield m

    parts = probe.among(on), {"rest": probe.among(~on)}
    ways = [moves.push(*parts, lopsided, 0.02, first=sign) for sign in (0.1, -0.1)]
    better = moves.push_either_way(*parts, lopsided, 0.02, by="rest", first=first)
    assert better is not None and all(ways)
    assert better.selectivity("rest") == max(way.selectivity("rest") for way in ways if way)
