"""The oracle: per-sample gradients against finite differences, closed forms and one backward pass a sample."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.divergence import Divergence
from eigendecomp.gradients import FunctionalSource
from eigendecomp.reference import Draws, Reference
from eigendecomp.target import Target
from tests.cases import Chosen

Examples = tuple[Tensor, ...]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Positions(nn.Module):
    """A small network with positions that look at each other, a scalar parameter and a tensor of order three."""

    def __init__(self, inputs: int, hidden: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(inputs, hidden, seed=seed))
        self.v = nn.Parameter(normal(2, hidden, outputs, seed=seed + 1))
        self.scale = nn.Parameter(normal(seed=seed + 2))
        self.unused = nn.Parameter(normal(2, seed=seed + 3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x @ self.w)
        return y @ self.v[0] + self.scale * (y.cumsum(1) @ self.v[1]).sin()


class Wrapped(nn.Module):
    """Any function of a module and its inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: Tensor | nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.function = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def drawn(target: Target, inputs: Examples, divergence: Divergence, reference: Reference, draws: int) -> Draws:
    f = target.outputs(inputs)
    generator = torch.Generator().manual_seed(0)
    pool = reference.prepare(divergence, divergence.predict(f.flatten(0, 1)), generator)
    return Draws.of(reference, divergence, pool, (f.shape[0], f.shape[1]), draws, generator)


def references_of(draws: Draws, f: Tensor) -> Tensor:
    """The reference of every sample and draw, read off the pool: (e, p, r, k)."""
    if draws.reference.fixed:
        return draws.pool[0].expand(*draws.noise.shape[:3], -1)
    assert isinstance(draws.reference, ed.OtherSample)
    return draws.pool[draws.noise]


def differences(target: Target, inputs: Examples, value: Callable[[Tensor], Tensor]) -> Tensor:
    """∂ value(outputs) / ∂ w by central differences: one column for each number in the chosen parameters."""
    columns = []
    for name, p in target.chosen.items():
        for i in range(p.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = {key: q.detach().clone() for key, q in target.chosen.items()}
                moved[name].view(-1)[i] += step
                ends.append(value(target.call(inputs, moved)).detach())
            columns.append((ends[0] - ends[1]) / 2e-5)
    return torch.stack(columns, -1)


CASES: list[tuple[Divergence, Reference]] = [
    (ed.SquaredError(), ed.Constant(0.3)),
    (ed.SquaredError(), ed.Mean()),
    (ed.SquaredError(), ed.OtherSample()),
    (ed.OutputSum(), ed.Constant(0.0)),
    (ed.KLDivergence(), ed.Uniform()),
    (ed.KLDivergence(), ed.Constant([0.5, 0.0, 0.5])),
    (ed.KLDivergence(), ed.OtherSample()),
]


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("divergence, reference", CASES, ids=lambda value: type(value).__name__)
def test_gradients_are_finite_differences_of_the_divergence(
    divergence: Divergence, reference: Reference, loop: bool
) -> None:
    inputs = (normal(3, 2, 2, seed=9),)
    target = Target(Positions(2, 2, 3, seed=0))
    draws = drawn(target, inputs, divergence, reference, 2)
    r = references_of(draws, target.outputs(inputs))
    expected = differences(target, inputs, lambda f: divergence.value(f.unsqueeze(2).expand_as(r), r))
    found = FunctionalSource(target, loop=loop)(inputs, draws).flat()
    torch.testing.assert_close(found, expected.flatten(0, 2), rtol=1e-6, atol=1e-7)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_a_linear_model_has_the_closed_form(e: int, i: int, o: int, loop: bool, seed: int) -> None:
    """f = W x + b under a squared error: 2 (f − c) xᵀ and 2 (f − c)."""
    model, x, c = nn.Linear(i, o).double(), normal(e, i, seed=seed), 0.7
    target = Target(model)
    draws = drawn(target, (x,), ed.SquaredError(), ed.Constant(c), 1)
    gradients = FunctionalSource(target, loop=loop)((x,), draws)
    residual = 2 * (model(x).detach() - c)
    dense = gradients.dense()
    torch.testing.assert_close(dense["weight"], residual[:, :, None] * x[:, None, :])
    torch.testing.assert_close(dense["bias"], residual)
    squares = residual.square().sum(1) * (1 + x.square().sum(1))
    torch.testing.assert_close(gradients.square_norms(), squares)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_samples_are_ordered_by_example_then_position_then_draw(
    e: int, p: int, r: int, k: int, loop: bool, seed: int
) -> None:
    model, x, c = Positions(2, 2, k, seed), normal(e, p, 2, seed=seed), normal(e, p, r, k, seed=seed + 1)
    target = Target(model)
    found = FunctionalSource(target, loop=loop)((x,), Chosen(c)).flat().view(e, p, r, -1)
    for i in range(e):
        for j in range(p):
            for n in range(r):
                f = model(x[i : i + 1])[0, j]
                g = torch.autograd.grad(f, list(model.parameters()), c[i, j, n], materialize_grads=True)
                torch.testing.assert_close(found[i, j, n], torch.cat([part.flatten() for part in g]))


def logits_object(output: Tensor) -> Any:
    class Output:
        logits = output

    return Output()


SHAPES: dict[str, tuple[Callable[..., Any], tuple[int, int]]] = {
    "one number an example": (lambda m, x, t: m.net(x)[:, 0, 0], (1, 1)),
    "one row an example": (lambda m, x, t: m.net(x)[:, 0], (1, 3)),
    "positions": (lambda m, x, t: m.net(x), (2, 3)),
    "two axes of positions": (lambda m, x, t: m.net(x)[:, :, None].expand(-1, -1, 2, -1), (4, 3)),
    "an object with logits": (lambda m, x, t: logits_object(m.net(x)), (2, 3)),
    "whole numbers as a second input": (lambda m, x, t: m.net(x) * m.table[t][:, None], (2, 3)),
}


@pytest.mark.parametrize("forward, size", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_of_every_shape_become_samples(forward: Callable[..., Any], size: tuple[int, int]) -> None:
    model = Wrapped(forward, net=nn.Linear(2, 3).double(), table=normal(4, 3))
    inputs = normal(5, 2, 2), torch.tensor([0, 3, 1, 0, 2])
    target = Target(model)
    f = target.outputs(inputs)
    assert f.shape == (5, *size)
    c = normal(5, size[0], 1, size[1], seed=3)
    fast, slow = (FunctionalSource(target, loop=loop)(inputs, Chosen(c)).flat() for loop in (False, True))
    assert fast.shape == (5 * size[0], 6 + 3 + 12)
    torch.testing.assert_close(fast, slow)


def test_gradients_are_linear_in_the_cotangent_and_blind_to_the_batch() -> None:
    target, x, c = Target(Positions(2, 3, 2, seed=4)), normal(5, 2, 2), normal(5, 2, 1, 2)
    source = FunctionalSource(target)
    whole = source((x,), Chosen(c)).flat()
    torch.testing.assert_close(source((x,), Chosen(-3 * c)).flat(), -3 * whole)
    parts = [source((x[i : i + 2],), Chosen(c[i : i + 2])).flat() for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("loop", [False, True])
def test_the_oracle_of_some_parameters_is_its_part_of_all(loop: bool) -> None:
    target, x, c = Target(Positions(2, 3, 2, seed=4)), normal(3, 2, 2), normal(3, 2, 1, 2)
    every = FunctionalSource(target, loop=loop)((x,), Chosen(c)).dense()
    names: Sequence[str] = ["scale", "v"]
    some = FunctionalSource(target, names, loop=loop)((x,), Chosen(c)).dense()
    assert list(some) == list(names)
    for name in names:
        torch.testing.assert_close(some[name], every[name])
        assert some[name].shape == (6, *target.shapes[name])
    assert not every["unused"].any()


def test_the_target_is_left_alone() -> None:
    model, x = Positions(2, 2, 2, seed=0), normal(3, 2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    target = Target(model)
    for loop in (False, True):
        FunctionalSource(target, loop=loop)((x,), drawn(target, (x,), ed.SquaredError(), ed.OtherSample(), 1))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad
