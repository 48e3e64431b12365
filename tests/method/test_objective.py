"""Equation 7, with derivatives of all coefficients and of the kept ones alone."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.directions import Directions, Factorization
from eigendecomp.factored import kept
from eigendecomp.factored.kept import coefficients, everything
from eigendecomp.factored.pieces import Recomputed
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.terms import Factored, Side
from eigendecomp.gradients import Formed, FunctionalSource, Gradients
from eigendecomp.objective import loss_and_error, squared_error
from eigendecomp.target import Target
from tests.cases import Chosen, assert_same

EXACT = 1e-10


class Network(nn.Module):
    """A lookup, a convolution over positions, a scale, and a matrix that meets positions apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 6), nn.Conv1d(6, 4, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.embed(x).mT).mT.tanh()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def captured(budget: int = 1 << 29, draws: int = 1) -> tuple[Gradients, Gradients]:
    """The same gradients factored and formed, of some examples twice over."""
    target, x = Target(Network().double()), torch.randint(7, (6, 3))
    cotangents = Chosen(torch.randn(6, 3, draws, 5).double())
    source = CapturedSource(target, (x,), terms=1 << 20, budget=budget)
    return source((x,), cotangents), FunctionalSource(target)((x,), cotangents)


def results(
    gradients: Gradients, rule: Any, dead: Tensor, tied: bool, rank: int, factorization: Factorization
) -> list[Tensor]:
    """Loss, error, kept coefficients, and the derivative of the loss in every factor."""
    draw = torch.Generator().manual_seed(0)
    decoder, encoder = (
        Directions.random(gradients.shapes, len(dead), rank, factorization, generator=draw, dtype=torch.float64).map(
            lambda factor: factor.requires_grad_()
        )
        for _ in range(2)
    )
    encoder = decoder if tied else encoder
    batch = coefficients(rule, gradients, encoder, decoder, 1.0)
    loss, error = loss_and_error(rule, batch, dead)
    leaves = [*decoder.tensors(), *([] if tied else encoder.tensors())]
    return [
        loss.detach(),
        error.detach(),
        batch.kept.detach(),
        *torch.autograd.grad(loss, leaves, materialize_grads=True),
    ]


@pytest.fixture
def kept_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Derivatives of the kept coefficients alone, whatever takes fewer operations."""
    monkeypatch.setattr(kept, "saves", lambda *_: True)
    yield monkeypatch


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank, factorization", [(1, "cp"), (3, "cp"), (2, "tucker")])
@pytest.mark.parametrize("draws", [1, 2])
def test_derivatives_of_kept_coefficients_are_those_of_all(
    draws: int, rank: int, factorization: str, tied: bool, kept_alone: pytest.MonkeyPatch
) -> None:
    gradients, formed = captured(draws=draws)
    assert any(isinstance(part, Factored) and part.formed is None for part in gradients.parts)
    dead = torch.arange(12) % 3 == 0
    for rule in (ed.BatchTopK(0.2, auxiliary=0.5), ed.BatchTopK(0.2, auxiliary=0.0)):
        arguments = rule, dead, tied, rank, cast(Factorization, factorization)
        found = [results(given, *arguments) for given in (gradients, formed)]
        with kept_alone.context() as patch:
            patch.setattr(kept, "saves", lambda *_: False)
            expected = results(formed, *arguments)
        for each in found:
            assert_same(each, expected, EXACT)


def test_many_kept_of_one_sample_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more are kept of one sample than was guessed, all coefficients are taken after all."""
    asked: list[float] = []
    monkeypatch.setattr(kept, "saves", lambda *given: asked.append(given[-1]) or len(asked) == 1)
    _, formed = captured()
    arguments = ed.BatchTopK(0.1), torch.zeros(12, dtype=torch.bool), False, 1, "cp"
    found = results(formed, *arguments)
    assert asked[0] == pytest.approx(4 * 0.1 * 12) and asked[1] == (found[2] != 0).sum(1).max()
    monkeypatch.setattr(kept, "saves", lambda *_: False)
    assert_same(found, results(formed, *arguments), EXACT)


def test_without_gradients_there_is_no_error_and_nothing_to_learn() -> None:
    shapes = {"a": (3, 2)}
    u = Directions.random(shapes, 4, 1).map(lambda factor: factor.requires_grad_())
    gradients = Gradients(shapes, [Formed(shapes, torch.zeros(5, 6))])
    rule, dead = ed.BatchTopK(0.5), torch.tensor([True, False, False, False])
    loss, error = loss_and_error(rule, everything(rule, gradients, u, u, 1.0), dead)
    assert loss == error == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, list(u.tensors())))


def test_equation_7_is_the_squared_error_of_rebuilding() -> None:
    g, s, u = torch.randn(5, 9).double(), torch.randn(5, 4).double(), torch.randn(4, 9).double()
    expected = (g - s @ u).square().sum()
    squares = g.square().sum(1)
    torch.testing.assert_close(squared_error(squares, s, g @ u.T, u @ u.T), expected)
    own = (u @ u.T).expand(5, 4, 4)
    torch.testing.assert_close(squared_error(squares, s, g @ u.T, own), expected)


def test_few_directions_or_many_kept_are_taken_all_together() -> None:
    """What was measured: see notebooks/cost."""

    def way(v: int, m: float, rank: int = 1) -> bool:
        shapes, data = {"w": (256, 256)}, torch.zeros(1, 128, 16, 256)
        u = Directions.random({"w": (256, 256)}, 1, rank)
        many = u.map(lambda factor: factor.expand(v, *factor.shape[1:]))
        part = Factored("w", (256, 256), (0,), [(Side(data, 256), Side(data, 256))])
        return kept.saves(Gradients(shapes, [part]), many, many, m)

    assert way(6400, 25) and way(1600, 25) and way(1600, 25, 4)
    assert not way(100, 20) and not way(200, 25) and not way(400, 400)


def test_a_large_batch_is_captured_twice_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, formed = captured(budget=1)
    made: list[int] = []
    (part,) = gradients.parts
    assert isinstance(part, Recomputed)
    part.pieces = [lambda piece=piece: made.append(1) or piece() for piece in part.pieces]
    arguments = ed.BatchTopK(0.2), torch.zeros(12, dtype=torch.bool), False, 1, "cp"
    found = results(gradients, *arguments)
    assert len(made) == 2 * len(part.pieces)
    assert_same(found, results(formed, *arguments), EXACT)
    few = Directions.random(gradients.shapes, 18 * 2, 1, dtype=torch.float64)
    assert not kept.saves(gradients, few, few, 1)
