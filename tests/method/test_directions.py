"""Low-rank directions: everything that is computed from factors, against the directions written out."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eigendecomp.directions import Directions, Factorization
from eigendecomp.support.axes import largest_rank

Shapes = dict[str, tuple[int, ...]]
FACTORIZATIONS: tuple[Factorization, ...] = ("cp", "tucker")

shape = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
mixed = st.lists(shape, min_size=1, max_size=3).map(lambda shapes: {f"t{i}": s for i, s in enumerate(shapes)})
factorization = st.sampled_from(FACTORIZATIONS)
property_test = settings(max_examples=60)


def random(shapes: Shapes, kind: Factorization, rank: int, seed: int, n: int = 3, scaled: bool = True) -> Directions:
    """Directions of a rank that some tensor can use; unless ``scaled``, of all sorts of norms."""
    most = max(largest_rank(s, kind) for s in shapes.values())
    generator = torch.Generator().manual_seed(seed)
    made = Directions.random(shapes, n, min(rank, most), kind, generator=generator, dtype=torch.float64)
    if scaled:
        return made
    return made.map(lambda f: f * torch.rand(len(f), generator=generator).double().view(-1, *[1] * (f.ndim - 1)) * 2)


def written_out(directions: Directions, name: str) -> Tensor:
    """One tensor of every direction by the definition: one einsum over all its factors."""
    factors, order = directions.factors[name], len(directions.shapes[name])
    axes = "abcd"[:order]
    if directions.factorization == "cp":
        return torch.einsum(",".join(f"vk{a}" for a in axes) + f"->v{axes}", *factors)
    return torch.einsum(f"v{axes.upper()}," + ",".join(f"v{a.upper()}{a}" for a in axes) + f"->v{axes}", *factors)


def rows(directions: Directions) -> Tensor:
    return torch.cat([written_out(directions, name).flatten(1) for name in directions.shapes], 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@property_test
@given(mixed, factorization, st.integers(1, 5), st.integers(0, 99))
def test_dense_and_flat_are_the_sums_over_factors(shapes: Shapes, kind: Factorization, rank: int, seed: int) -> None:
    directions = random(shapes, kind, rank, seed, scaled=False)
    for name, size in shapes.items():
        assert directions.dense(name).shape == (3, *size)
        close(directions.dense(name), written_out(directions, name))
    close(directions.flat(), rows(directions))
    last = list(shapes)[-1:]
    close(directions.flat(last), written_out(directions, last[0]).flatten(1))


@property_test
@given(mixed, factorization, st.integers(1, 5), factorization, st.integers(1, 5), st.integers(0, 99))
def test_gram_is_the_inner_product_of_rows(
    shapes: Shapes, kind: Factorization, rank: int, other_kind: Factorization, other_rank: int, seed: int
) -> None:
    one = random(shapes, kind, rank, seed, scaled=False)
    other = random(shapes, other_kind, other_rank, seed + 1, n=2, scaled=False)
    close(one.gram(), rows(one) @ rows(one).T)
    close(one.gram(other), rows(one) @ rows(other).T)


@property_test
@given(mixed, factorization, st.integers(1, 5), st.integers(0, 99))
def test_norms_are_those_of_the_rows(shapes: Shapes, kind: Factorization, rank: int, seed: int) -> None:
    directions = random(shapes, kind, rank, seed, scaled=False)
    close(directions.norms(), rows(directions).norm(dim=1))
    by_tensor = torch.stack([written_out(directions, name).flatten(1).norm(dim=1) for name in shapes], 1)
    close(directions.norms(by_tensor=True), by_tensor)


@settings(max_examples=25)
@given(shape, factorization, st.integers(1, 5), st.integers(0, 99))
def test_pair_splits_any_axes_from_the_others(size: tuple[int, ...], kind: Factorization, rank: int, seed: int) -> None:
    directions = random({"t": size}, kind, rank, seed)
    formed = written_out(directions, "t")
    axes = range(len(size))
    for chosen in (order for count in range(len(size) + 1) for order in permutations(axes, count)):
        rest = [axis for axis in axes if axis not in chosen]
        left, right = directions.pair("t", chosen)
        height, width = (math.prod(size[axis] for axis in part) for part in (chosen, rest))
        matrix = formed.permute(0, *(axis + 1 for axis in (*chosen, *rest))).reshape(3, height, width)
        close(torch.einsum("vkr,vkc->vrc", left, right), matrix)
        if kind == "tucker":  # no more terms than the side of smaller rank has
            ranks = directions.factors["t"][0].shape[1:]
            assert left.shape[1] == min(math.prod(ranks[a] for a in chosen), math.prod(ranks[a] for a in rest))


@property_test
@given(mixed, factorization, st.integers(1, 5), st.integers(0, 99), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_select_takes_rows(shapes: Shapes, kind: Factorization, rank: int, seed: int, index: list[int]) -> None:
    directions = random(shapes, kind, rank, seed, scaled=False)
    assert torch.equal(directions.select(index).flat(), directions.flat()[index])
    assert torch.equal(directions.select(torch.tensor(index)).flat(), directions.flat()[index])
    assert directions.select(index).n == len(index)


@property_test
@example({"t0": (4, 4, 4, 4)}, "cp", 1, 0)
@given(mixed, factorization, st.integers(1, 5), st.integers(0, 99))
def test_random_directions_have_unit_norm_spread_evenly(
    shapes: Shapes, kind: Factorization, rank: int, seed: int
) -> None:
    directions = random(shapes, kind, rank, seed)
    close(rows(directions).norm(dim=1), torch.ones(3, dtype=torch.float64))
    even = torch.full((3, len(shapes)), len(shapes) ** -0.5, dtype=torch.float64)
    close(directions.norms(by_tensor=True), even)  # type: ignore[arg-type]


@property_test
@given(mixed, factorization, st.integers(1, 5), st.integers(0, 99))
def test_normalize_scales_each_row_and_nothing_else(shapes: Shapes, kind: Factorization, rank: int, seed: int) -> None:
    directions = random(shapes, kind, rank, seed, scaled=False)
    before = rows(directions)
    assert directions.normalize_() is directions
    close(rows(directions), before / before.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_a_zero_direction_stays_zero_and_finite(kind: Factorization) -> None:
    directions = random({"a": (3, 2), "b": (2,)}, kind, 2, 0)
    for factor in directions.tensors():
        factor[1] = 0
    directions.normalize_()
    assert torch.equal(directions.flat()[1], torch.zeros(8, dtype=torch.float64))
    close(directions.norms(), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_no_tensor_gets_more_rank_than_it_can_use(kind: Factorization) -> None:
    shapes: Shapes = {"bias": (5,), "wide": (2, 7), "kernel": (2, 3, 4)}
    directions = Directions.random(shapes, 2, 4, kind)
    if kind == "cp":
        assert [directions.factors[name][0].shape[1] for name in shapes] == [1, 2, 4]
    else:
        assert [tuple(directions.factors[name][0].shape[1:]) for name in shapes] == [(4,), (2, 4), (2, 3, 4)]


@settings(max_examples=30)
@given(shape, st.integers(0, 99))
def test_the_largest_rank_reaches_every_tensor(size: tuple[int, ...], seed: int) -> None:
    """At that rank any tensor at all is Σ (unit vectors of the other axes) ⊗ (its fibre along the longest)."""
    wanted = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    longest = size.index(max(size))
    others = [axis for axis in range(len(size)) if axis != longest]
    rank = largest_rank(size, "cp")
    directions = Directions.random({"t": size}, 1, rank, dtype=torch.float64)
    places = torch.cartesian_prod(*[torch.arange(size[a]) for a in others]).view(rank, -1) if others else None
    for axis in range(len(size)):
        if axis == longest:
            fibres = wanted.movedim(longest, -1).reshape(rank, size[longest])
            directions.factors["t"][axis] = fibres[None]
        else:
            assert places is not None
            chosen = places[:, others.index(axis)]
            directions.factors["t"][axis] = torch.eye(size[axis], dtype=torch.float64)[chosen][None]
    close(directions.dense("t")[0], wanted)


@settings(max_examples=20)
@given(mixed, factorization, st.integers(1, 3), st.integers(0, 99))
def test_gram_is_differentiable_in_the_factors(shapes: Shapes, kind: Factorization, rank: int, seed: int) -> None:
    directions = random(shapes, kind, rank, seed).map(lambda factor: factor.requires_grad_())
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factors = list(directions.tensors())
    fast = torch.autograd.grad((directions.gram() * weight).sum(), factors)
    slow = torch.autograd.grad((rows(directions) @ rows(directions).T * weight).sum(), factors)
    for a, b in zip(fast, slow, strict=True):
        close(a, b)


def test_the_seed_decides_the_directions() -> None:
    shapes: Shapes = {"a": (3, 2), "b": (2,)}
    same, again, other = (
        Directions.random(shapes, 2, 1, generator=torch.Generator().manual_seed(seed)).flat() for seed in (0, 0, 1)
    )
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


@pytest.mark.parametrize(
    "n, rank, kind, words",
    [
        (0, 1, "cp", "n_directions=0"),
        (-1, 1, "cp", "n_directions=-1"),
        (1, 0, "cp", "rank=0 is outside 1 to 3"),
        (1, 4, "cp", "rank=4 is outside 1 to 3"),  # a 3 × 5 matrix has rank 3 at most
        (1, 6, "tucker", "rank=6 is outside 1 to 5"),
    ],
)
def test_a_count_or_rank_of_no_use_is_refused(n: int, rank: int, kind: Factorization, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Directions.random({"matrix": (3, 5), "bias": (3,)}, n, rank, kind)


def test_sets_over_different_tensors_have_no_inner_products() -> None:
    one, other = Directions.random({"a": (3, 2)}, 2, 1), Directions.random({"a": (2, 3)}, 2, 1)
    with pytest.raises(ValueError, match="different tensors"):
        one.gram(other)
