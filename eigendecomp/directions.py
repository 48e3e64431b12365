"""Directions in parameter space, low rank in each tensor, kept as factors.

A direction u is one tensor for each chosen parameter. CP writes it Σ_k a_k ⊗ b_k ⊗ …, one factor matrix an axis
(eq. 8); Tucker a small core and one factor matrix an axis. Nothing here depends on the order of a tensor, and nothing
forms a direction unless it is asked to: inner products between directions come from the factors' Gram matrices.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Self

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from eigendecomp.support.algebra import SelfGram, khatri_rao, kronecker
from eigendecomp.support.axes import Factorization, Shapes, check_rank, factor_sizes, groups_of, lengths, named

OPS_PER_ELEMENT = 100  # cost of writing one intermediate element, in multiply–adds: measured, see notebooks/cost


class LowRank:
    """One tensor of n directions, as factors each of which covers one axis, or axes that are grouped.

    For CP these are (n, k, d) matrices, one an axis (eq. 8); for Tucker a core (n, r_1, …, r_m) and then (n, r_a, d_a).
    """

    def __init__(self, shape: tuple[int, ...], tucker: bool, factors: list[Tensor]) -> None:
        self.shape, self.tucker, self.factors, self.groups = shape, tucker, factors, groups_of(shape)
        self.first = sorted(self.groups[0])  # the axes of the first factor: a split that is always there
        ranks = factors[0].shape[1:]
        # How many terms the two sides of `pair` have in a matrix, or at least in another tensor.
        self.terms = min(ranks[0], math.prod(ranks[1:])) if tucker else ranks[0]

    def splits(self, axes: Sequence[int]) -> bool:
        """Whether these are the axes of some factors, so that the other axes are those of the rest."""
        return all(set(group) <= set(axes) or not set(group) & set(axes) for group in self.groups)

    def pair(self, axes: Sequence[int]) -> tuple[Float[Tensor, "v k r"], Float[Tensor, "v k c"]]:
        """Factors L, R with u = Σ_k L_k ⊗ R_k once these axes are flattened into rows and the rest into columns.

        With no axis on a side, that side is a single one.
        """
        left = [i for i, group in enumerate(self.groups) if group[0] in axes]
        right = [i for i in range(len(self.groups)) if i not in left]
        if self.tucker:
            core, *factors = self.factors
            a, b = (kronecker(core, [factors[i] for i in side]) for side in (left, right))
            ranks = lengths(core.shape[1:], range(core.ndim - 1))
            matrix = rearrange(core, f"v {named(range(core.ndim - 1))} -> v ({named(left)}) ({named(right)})", **ranks)
            # The side of smaller rank stays bare and the core joins the other, so k is the smaller of the two ranks.
            a, b = (a, matrix @ b) if a.shape[1] <= b.shape[1] else (matrix.mT @ a, b)
        else:
            ones = self.factors[0].new_ones(*self.factors[0].shape[:2], 1)
            a, b = (khatri_rao([self.factors[i] for i in side]) if side else ones for side in (left, right))
        rest = [axis for axis in range(len(self.shape)) if axis not in axes]
        return self._in_order(a, left, axes), self._in_order(b, right, rest)

    def _in_order(self, x: Float[Tensor, "v k d"], factors: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """The flattened product of some factors, with its entries in the order of the axes that are wanted."""
        axes = [axis for i in factors for axis in self.groups[i]]
        if axes == list(wanted):
            return x
        return rearrange(x, f"v k ({named(axes)}) -> v k ({named(wanted)})", **lengths(self.shape, axes))

    def canonical(self) -> Sequence[Float[Tensor, "v k _"]]:
        """Factors of a sum of k outer products: one each for CP, the first and the rest for Tucker."""
        return self.pair(self.first) if self.tucker else self.factors

    def dense(self) -> Float[Tensor, "v *shape"]:
        """The tensor of every direction, formed."""
        axes = range(len(self.shape))
        rest = [axis for axis in axes if axis not in self.first]
        left, right = self.pair(self.first)
        if [*self.first, *rest] == [*axes]:
            return (left.mT @ right).reshape(len(left), *self.shape)
        pattern = f"v ({named(self.first)}) ({named(rest)}) -> v {named(axes)}"
        return rearrange(left.mT @ right, pattern, **lengths(self.shape, axes))

    def square_norms(self) -> Float[Tensor, " v"]:
        """Every direction's squared norm in this tensor."""
        # Terms that nearly cancel grow without bound in a direction that is not used: in single precision what is left
        # of their norms can come out as zero, and dividing by it ends the fit.
        wide = (factor.double() if factor.shape[1] > 1 else factor for factor in self.canonical())
        product = reduce(torch.mul, (factor @ factor.mT for factor in wide))
        return product.sum((1, 2)).clamp_min(0).to(self.factors[0].dtype)

    def scale_(self, scale: Float[Tensor, " v"]) -> None:
        """Multiply every direction's part in this tensor by a number, in place."""
        few = self.factors[:1] if self.tucker else self.factors
        for factor in few:
            factor.mul_((scale ** (1 / len(few))).view(-1, *[1] * (factor.ndim - 1)))


class Directions:
    """``n`` directions over named tensors, ``factors[name]`` being those of a :class:`LowRank`.

    Vectors have rank one, and no tensor gets more rank than it can use.
    """

    def __init__(self, shapes: Shapes, factorization: Factorization, factors: dict[str, list[Tensor]]) -> None:
        self.shapes = dict(shapes)
        self.factorization: Factorization = factorization
        self.factors = factors
        self.tensor = {name: LowRank(shape, factorization == "tucker", factors[name]) for name, shape in shapes.items()}

    @classmethod
    def random(
        cls,
        shapes: Shapes,
        n: int,
        rank: int,
        factorization: Factorization = "cp",
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Directions with Gaussian factors, scaled to unit *rebuilt* norm; without a generator, those of seed 0.

        A product of small factors vanishes and then never trains; so each tensor's part starts at norm 1/√(tensors).

        Raises:
            ValueError: if ``n`` or ``rank`` is not positive, or no tensor can use the rank.
        """
        if n < 1:
            raise ValueError(f"n_directions={n} must be at least 1")
        check_rank(shapes, rank, factorization)
        generator = torch.Generator().manual_seed(0) if generator is None else generator

        def gauss(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=dtype).to(device)

        factors: dict[str, list[Tensor]] = {}
        for name, shape in shapes.items():
            sizes = factor_sizes(shape, rank, factorization)
            factors[name] = [gauss(n, *size) for size in sizes[-len(groups_of(shape)) :]]
            if factorization == "tucker":  # rows of about unit norm, so that they take as large steps as the core
                factors[name] = [gauss(n, *sizes[0]), *(matrix / matrix.shape[2] ** 0.5 for matrix in factors[name])]
        made = cls(shapes, factorization, factors)
        for tensor in made.tensor.values():
            tensor.scale_(tensor.square_norms().rsqrt())
        return made.normalize_()

    @property
    def n(self) -> int:
        return next(self.tensors()).shape[0]

    @property
    def sums_terms(self) -> bool:
        """Whether a direction is a sum of CP terms, which can cancel."""
        return self.factorization == "cp" and any(tensor.terms > 1 for tensor in self.tensor.values())

    def tensors(self) -> Iterator[Tensor]:
        """Every factor, in a fixed order."""
        return (factor for factors in self.factors.values() for factor in factors)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same directions with ``function`` applied to every factor."""
        factors = {name: [function(factor) for factor in factors] for name, factors in self.factors.items()}
        return type(self)(self.shapes, self.factorization, factors)

    def select(self, index: Sequence[int] | Tensor) -> Self:
        """The chosen directions alone."""
        index = torch.as_tensor(index, dtype=torch.long)
        return self.map(lambda factor: factor.index_select(0, index.to(factor.device)))

    def beside(self, other: "Directions") -> Self:
        """These directions and then others of the same kind, as one set."""
        rest = iter(other.tensors())
        return self.map(lambda factor: torch.cat([factor, next(rest)]))

    def pair(self, name: str, axes: Sequence[int]) -> tuple[Float[Tensor, "v k r"], Float[Tensor, "v k c"]]:
        """L (v, k, r) and R (v, k, c) of one tensor; ValueError if axes that share a factor are on both sides."""
        if not self.tensor[name].splits(axes):
            raise ValueError(f"axes of {name!r} that are grouped stand on two sides of its use; group others")
        return self.tensor[name].pair(axes)

    def dense(self, name: str) -> Float[Tensor, "v *shape"]:
        """One tensor of every direction, formed."""
        return self.tensor[name].dense()

    def flat(self, names: Iterable[str] | None = None) -> Float[Tensor, "v w"]:
        """The directions as rows over the flattened tensors ``names`` (all, in order)."""
        return torch.cat([self.dense(name).flatten(1) for name in (self.shapes if names is None else names)], 1)

    def gram(self, other: "Directions | None" = None, names: Iterable[str] | None = None) -> Float[Tensor, "v w"]:
        """⟨u_v, u'_w⟩ over the tensors ``names`` (all), for all pairs, from the factors' Gram matrices (eq. 9)."""
        other = self if other is None else other
        if self.shapes != other.shapes:
            raise ValueError("the two sets of directions are over different tensors")
        return reduce(torch.add, (gram(self.tensor[name], other.tensor[name]) for name in names or self.shapes))

    def norms(self, by_tensor: bool = False) -> Float[Tensor, " v"] | Float[Tensor, "v tensors"]:
        """Each direction's norm over all tensors together, or its share in every tensor."""
        squares = torch.stack([tensor.square_norms() for tensor in self.tensor.values()], -1)
        return squares.sqrt() if by_tensor else squares.sum(-1).sqrt()

    def cancellation(self) -> Float[Tensor, " v"]:
        """Σ_k ‖term k‖² over all tensors of every unit direction: about 1, and large where its CP terms cancel."""
        squares = [[factor.square().sum(-1) for factor in factors] for factors in self.factors.values()]
        return torch.stack([reduce(torch.mul, axes).sum(1) for axes in squares]).sum(0)

    @torch.no_grad()
    def normalize_(self) -> Self:
        """Scale every direction to unit norm over all tensors together, in place; no direction is formed."""
        scale = self.norms().clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
        for tensor in self.tensor.values():
            tensor.scale_(scale)
        return self


def gram(a: LowRank, b: LowRank) -> Float[Tensor, "v w"]:
    """⟨u_v, u'_w⟩ in one tensor: the factors' Gram matrices, multiplied over axes and summed over terms (eq. 9)."""
    mine = a.canonical()
    others = mine if a is b else b.canonical()
    if a.groups == b.groups and len(mine) != len(others):
        mine, others = a.pair(a.first), b.pair(a.first)
    if a.groups != b.groups or better_formed([x.shape for x in mine], [y.shape for y in others]):
        mine = [a.dense().flatten(1).unsqueeze(1)]
        others = mine if a is b else [b.dense().flatten(1).unsqueeze(1)]
    v, k, w, j = *mine[0].shape[:2], *others[0].shape[:2]
    matrices = [(x.flatten(0, 1), y.flatten(0, 1)) for x, y in zip(mine, others, strict=True)]
    product = reduce(torch.mul, (SelfGram.apply(x) if a is b else x @ y.T for x, y in matrices))
    return rearrange(product, "(v k) (w j) -> v k w j", v=v, w=w).sum((1, 3)) if k * j > 1 else product


def better_formed(mine: Sequence[torch.Size], others: Sequence[torch.Size]) -> bool:
    """Whether a tensor's Gram matrix costs less from formed directions than from factors (v, k, d), by operations."""
    (v, k, _), (w, j, _) = mine[0], others[0]
    size = math.prod(shape[2] for shape in mine)
    factored = v * k * w * j * sum(2 * shape[2] + OPS_PER_ELEMENT for shape in mine)
    return (v + w) / 2 * size * (v + w + k + j + OPS_PER_ELEMENT) < factored
