"""Divergences and references: derivatives against autograd, random cotangents against their promised moments."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eigendecomp as ed
from eigendecomp.divergence import Divergence
from eigendecomp.reference import Draws, Reference

DIVERGENCES: list[Divergence] = [ed.SquaredError(), ed.KLDivergence()]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)
property_test = settings(max_examples=25)
width, seeds, scales = st.integers(2, 5), st.integers(0, 999), st.sampled_from([0.1, 1.0, 10.0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curvature(divergence: Divergence, f: Tensor) -> Tensor:
    """S: the Hessian of D(f', f) in f' at f' = f, by autograd."""
    r = divergence.predict(f)
    return torch.autograd.functional.hessian(lambda x: divergence.value(x, r), f)  # type: ignore[return-value]


@pytest.mark.parametrize("divergence", [*DIVERGENCES, ed.OutputSum()], ids=lambda d: type(d).__name__)
@property_test
@given(width, seeds, scales)
def test_the_cotangent_is_the_derivative(divergence: Divergence, k: int, seed: int, scale: float) -> None:
    f = (scale * normal(3, k, seed=seed)).requires_grad_()
    r = divergence.predict(scale * normal(3, k, seed=seed + 1))
    (expected,) = torch.autograd.grad(divergence.value(f, r).sum(), f)
    torch.testing.assert_close(divergence.cotangent(f, r), expected)


@every_divergence
@property_test
@given(width, seeds, scales)
def test_the_root_squared_is_the_curvature(divergence: Divergence, k: int, seed: int, scale: float) -> None:
    f = scale * normal(k, seed=seed)
    root = divergence.root(f, torch.eye(k, dtype=torch.float64))  # its rows are R's columns
    torch.testing.assert_close(root @ root.T, curvature(divergence, f), rtol=1e-9, atol=1e-12)


@every_divergence
@property_test
@given(width, seeds)
def test_an_output_is_its_own_minimum(divergence: Divergence, k: int, seed: int) -> None:
    f, other = normal(k, seed=seed), normal(k, seed=seed + 1)
    own = divergence.predict(f)
    assert abs(divergence.value(f, own).item()) < 1e-12
    assert divergence.value(other, own) > 0
    assert divergence.cotangent(f, own).abs().max() < 1e-12


def test_kl_is_the_sum_of_its_definition_and_takes_zeros() -> None:
    f, q = normal(4), torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    p = f.softmax(-1)
    expected = sum(a * math.log(a / b) for a, b in zip(q.tolist(), p.tolist(), strict=True) if a > 0)
    assert ed.KLDivergence().value(f, q).item() == pytest.approx(expected)
    assert ed.SquaredError().value(f, q).item() == pytest.approx(sum((f - q).square().tolist()))


def test_kl_stays_finite_for_outputs_that_are_certain() -> None:
    f = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 1e4]])
    r = torch.full((2, 3), 1 / 3)
    kl = ed.KLDivergence()
    noise = kl.noise((2,), 3, torch.Generator().manual_seed(0))
    for value in (kl.value(f, r), kl.cotangent(f, r), kl.root(f, torch.eye(3)[:2]), kl.draw(f, noise)):
        assert value.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Draws from the model


@every_divergence
@settings(max_examples=5)
@given(width, seeds)
def test_model_samples_have_the_curvature_as_second_moment(divergence: Divergence, k: int, seed: int) -> None:
    """Every entry of the mean of c cᵀ is within five standard errors of S; so is the mean of c of zero."""
    count, f = 20_000, normal(k, seed=seed)
    draws = Draws.of(
        ed.ModelSample(), divergence, f.new_zeros(0, k), (1, 1), count, torch.Generator().manual_seed(seed)
    )
    c = draws(f.view(1, 1, k))[0, 0]
    assert c.shape == (count, k)
    products = c.unsqueeze(2) * c.unsqueeze(1)
    error = products.std(0) / count**0.5
    assert ((products.mean(0) - curvature(divergence, f)).abs() <= 5 * error + 1e-12).all()
    assert (c.mean(0).abs() <= 5 * c.std(0) / count**0.5).all()


def test_kl_draws_are_p_minus_a_one_hot_and_reach_every_class() -> None:
    kl, f = ed.KLDivergence(), torch.tensor([0.0, 1.0, 2.0, -60.0])
    noise = torch.tensor([0.0, 0.2, 0.999999, 1.0 - 2**-24])
    y = f.softmax(-1) - kl.draw(f.expand(4, 4), noise)
    assert torch.equal(y.round(), y.round().clamp(0, 1)) and torch.allclose(y.sum(-1), torch.ones(4))
    assert y.argmax(-1).tolist() == [0, 1, 2, 2]  # no draw lands on a class of probability 1e-27


# ---------------------------------------------------------------------------------------------------------------------
# References

FIXED: list[tuple[Reference, Divergence]] = [
    (ed.Constant(0.5), ed.SquaredError()),
    (ed.Constant([0.25, 0.75, 0.0]), ed.SquaredError()),
    (ed.Constant([0.25, 0.75, 0.0]), ed.KLDivergence()),
    (ed.Uniform(), ed.KLDivergence()),
    (ed.Mean(), ed.SquaredError()),
    (ed.Mean(), ed.KLDivergence()),
]
DRAWN: list[tuple[Reference, Divergence]] = [
    (reference, divergence) for reference in (ed.OtherSample(), ed.ModelSample()) for divergence in DIVERGENCES
]


def drawn(reference: Reference, divergence: Divergence, f: Tensor, draws: int, seed: int) -> Draws:
    generator = torch.Generator().manual_seed(seed)
    pool = reference.prepare(divergence, divergence.predict(f.flatten(0, 1)), generator)
    return Draws.of(reference, divergence, pool, (f.shape[0], f.shape[1]), draws, generator)


def name(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("reference, divergence", FIXED, ids=name)
def test_fixed_references_are_fixed_and_what_they_say(reference: Reference, divergence: Divergence) -> None:
    f = normal(4, 2, 3)
    assert reference.fixed
    one, other = (drawn(reference, divergence, f, 2, seed)(f) for seed in (0, 1))
    assert torch.equal(one, other) and torch.equal(one[:, :, 0], one[:, :, 1])
    if isinstance(reference, ed.Constant):
        r = torch.as_tensor(reference.c, dtype=f.dtype).expand(3)
    else:
        r = torch.full((3,), 1 / 3) if isinstance(reference, ed.Uniform) else divergence.predict(f).mean((0, 1))
    torch.testing.assert_close(one[:, :, 0], divergence.cotangent(f, r.to(f)))


@pytest.mark.parametrize("reference, divergence", DRAWN, ids=name)
def test_drawn_references_follow_the_seed_and_go_with_their_samples(
    reference: Reference, divergence: Divergence
) -> None:
    f = normal(6, 2, 3)
    assert not reference.fixed
    draws = drawn(reference, divergence, f, 3, 0)
    c = draws(f)
    assert c.shape == (6, 2, 3, 3)
    assert torch.equal(c, drawn(reference, divergence, f, 3, 0)(f))
    assert not torch.equal(c, drawn(reference, divergence, f, 3, 1)(f))
    assert not torch.equal(c[:, :, 0], c[:, :, 1])
    for rows in (slice(0, 2), slice(3, 6)):
        torch.testing.assert_close(draws[rows](f[rows]), c[rows])


@pytest.mark.parametrize("reference, divergence", DRAWN, ids=name)
def test_the_first_samples_draw_the_same_however_many_follow(reference: Reference, divergence: Divergence) -> None:
    f = normal(40, 3, 3)
    pool = reference.prepare(divergence, divergence.predict(f.flatten(0, 1)), torch.Generator())

    def draws(*sizes: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        parts = [Draws.of(reference, divergence, pool, (size, 3), 2, generator) for size in sizes]
        return torch.cat([part.noise for part in parts])

    whole = draws(40)
    assert torch.equal(draws(1, 2, 30, 7), whole)
    assert torch.equal(draws(5), whole[:5])


def test_other_samples_come_from_the_pool_and_all_of_it() -> None:
    f, divergence = normal(5, 2, 3), ed.SquaredError()
    draws = drawn(ed.OtherSample(pool=4), divergence, f, 64, 0)
    assert draws.pool.shape == (4, 3)
    rows = f.flatten(0, 1)
    assert all((row == rows).all(1).any() for row in draws.pool)
    r = f.unsqueeze(2) - draws(f) / 2
    nearest = torch.cdist(r.flatten(0, 2), draws.pool)
    assert nearest.amin(1).max() < 1e-6
    assert set(nearest.argmin(1).tolist()) == {0, 1, 2, 3}


def test_a_pool_holds_no_more_than_there_is_and_can_be_smaller() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = normal(7, 3)
    for size, expected in ((2, 2), (7, 7), (100, 7)):
        pool = ed.OtherSample(pool=size).prepare(ed.SquaredError(), predictions, generator)
        assert len(pool) == expected == len(pool.unique(dim=0))


ANY: Any = ed  # whose arguments' types nobody checks


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ed.Constant([0, 1, 2]), "class labels"),
        (lambda: ANY.Constant(torch.tensor([1, 2])), "class labels"),
        (lambda: ed.Constant(math.nan), "finite"),
        (lambda: ed.Constant([1.0, math.inf]), "finite"),
        (lambda: ed.OtherSample(pool=1), r"pool.*=1 must be a whole number from 2"),
    ],
)
def test_references_that_mean_nothing_are_refused(make: Callable[[], Reference], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "reference, divergence, words",
    [
        (ed.Uniform(), ed.SquaredError(), "KLDivergence"),
        (ed.Constant([0.5, 0.5]), ed.SquaredError(), "2.* 3 outputs.*give 1 or 3"),
        (ANY.Constant([[1.0, 0.0, 0.0]]), ed.SquaredError(), "give 1 or 3 values"),
        (ed.Constant([0.5, 0.6, 0.1]), ed.KLDivergence(), "distribution"),
        (ed.Constant([1.5, -0.5, 0.0]), ed.KLDivergence(), "distribution"),
        (ed.Constant(0.0), ed.KLDivergence(), "distribution"),
    ],
    ids=name,
)
def test_references_that_do_not_fit_are_refused(reference: Reference, divergence: Divergence, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reference.prepare(divergence, divergence.predict(normal(4, 3)), torch.Generator())


def test_another_sample_needs_another_sample() -> None:
    with pytest.raises(ValueError, match="two or more"):
        ed.OtherSample().prepare(ed.SquaredError(), normal(1, 3), torch.Generator())
