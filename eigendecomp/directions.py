"""Directions in parameter space, low rank in each tensor, kept as factors.

A direction u is one tensor for each chosen parameter. CP writes it Σ_k a_k ⊗ b_k ⊗ …, one factor matrix an axis
(eq. 8); Tucker a small core and one factor matrix an axis. Nothing here depends on the order of a tensor, and nothing
forms a direction unless it is asked to: inner products between directions come from the factors' Gram matrices.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

Factorization = Literal["cp", "tucker"]
Shapes = Mapping[str, tuple[int, ...]]

NUMBER = 100  # what an intermediate number costs beside its arithmetic, in operations: measured, see notebooks/cost


def largest_rank(shape: Sequence[int], factorization: Factorization) -> int:
    """The rank from which a tensor of this shape gains nothing more."""
    if factorization == "tucker":
        return max(shape)
    return math.prod(shape) // max(shape)


def check_rank(shapes: Shapes, rank: int, factorization: Factorization) -> None:
    """Raises ValueError if the rank is not positive, or no tensor can use it."""
    most = max(largest_rank(shape, factorization) for shape in shapes.values())
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank} is outside 1 to {most}: no chosen tensor {dict(shapes)} can use more in {factorization}"
        )


def khatri_rao(factors: Sequence[Float[Tensor, "v k _"]]) -> Float[Tensor, "v k d"]:
    """The flattened outer product over axes of every rank-one term."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
    return product


class Directions:
    """``n`` directions over named tensors.

    ``factors[name]`` holds, for CP, one (n, rank, d) matrix an axis; for Tucker a core (n, r_1, …, r_m) and then one
    (n, r_a, d_a) matrix an axis. Vectors have rank one, and no tensor gets more rank than it can use.
    """

    def __init__(self, shapes: Shapes, factorization: Factorization, factors: dict[str, list[Tensor]]) -> None:
        self.shapes = dict(shapes)
        self.factorization: Factorization = factorization
        self.factors = factors

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
            if factorization == "cp":
                k = min(rank, largest_rank(shape, "cp"))
                factors[name] = [gauss(n, k, d) for d in shape]
            else:
                ranks = [min(rank, d) for d in shape]
                # Rows of about unit norm, so that a step of the optimiser is as large for them as for the core.
                matrices = [gauss(n, r, d) / d**0.5 for r, d in zip(ranks, shape, strict=True)]
                factors[name] = [gauss(n, *ranks), *matrices]
        made = cls(shapes, factorization, factors)
        for name, square in made._square_norms().items():
            made._scale(name, square.rsqrt())
        return made.normalize_()

    @property
    def n(self) -> int:
        return next(self.tensors()).shape[0]

    @property
    def sums_terms(self) -> bool:
        """Whether a direction is a sum of CP terms, which can cancel."""
        return self.factorization == "cp" and any(factors[0].shape[1] > 1 for factors in self.factors.values())

    def tensors(self) -> Iterator[Tensor]:
        """Every factor, in a fixed order."""
        return (factor for factors in self.factors.values() for factor in factors)

    def map(self, function) -> Self:
        """The same directions with ``function`` applied to every factor."""
        factors = {name: [function(factor) for factor in factors] for name, factors in self.factors.items()}
        return type(self)(self.shapes, self.factorization, factors)

    def select(self, index: Sequence[int] | Tensor) -> Self:
        """The chosen directions alone."""
        rows = index if isinstance(index, Tensor) else torch.tensor(list(index), dtype=torch.long)
        return self.map(lambda factor: factor[rows.to(factor.device)])

    def beside(self, other: "Directions") -> Self:
        """These directions and then others of the same kind, as one set."""
        rest = iter(other.tensors())
        return self.map(lambda factor: torch.cat([factor, next(rest)]))

    def pair(self, name: str, rows: Sequence[int]) -> tuple[Float[Tensor, "v k r"], Float[Tensor, "v k c"]]:
        """Factors L, R with u = Σ_k L_k ⊗ R_k once the axes ``rows`` are flattened into rows and the rest into columns.

        With no axis on a side, that side is a single one.
        """
        columns = [axis for axis in range(len(self.shapes[name])) if axis not in rows]
        if self.factorization == "cp":
            factors = self.factors[name]
            ones = factors[0].new_ones(*factors[0].shape[:2], 1)
            left = khatri_rao([factors[axis] for axis in rows]) if rows else ones
            right = khatri_rao([factors[axis] for axis in columns]) if columns else ones
            return left, right
        core, *factors = self.factors[name]

        def kron(axes: Sequence[int]) -> Tensor:  # (v, Π r_a, Π d_a)
            product = core.new_ones(core.shape[0], 1, 1)
            for axis in axes:
                product = torch.einsum("vrd,vse->vrsde", product, factors[axis]).flatten(3).flatten(1, 2)
            return product

        # The side of smaller rank stays bare and the core joins the other, so k is the smaller of the two ranks.
        left, right = kron(rows), kron(columns)
        matrix = core.permute(0, *(axis + 1 for axis in (*rows, *columns))).reshape(
            core.shape[0], left.shape[1], right.shape[1]
        )
        if left.shape[1] <= right.shape[1]:
            return left, matrix @ right
        return matrix.mT @ left, right

    def _canonical(self, name: str) -> Sequence[Float[Tensor, "v k _"]]:
        """Factors of a sum of outer products: an axis each for CP, first axis and rest for Tucker."""
        return self.factors[name] if self.factorization == "cp" else self.pair(name, [0])

    def dense(self, name: str) -> Float[Tensor, "v *shape"]:
        """One tensor of every direction, formed."""
        factors = self._canonical(name)
        if len(factors) == 1:
            return factors[0].sum(1)
        return (factors[0].mT @ khatri_rao(factors[1:])).reshape(-1, *self.shapes[name])

    def flat(self, names: Iterable[str] | None = None) -> Float[Tensor, "v w"]:
        """The directions as rows over the flattened tensors ``names`` (all, in order)."""
        return torch.cat([self.dense(name).flatten(1) for name in (self.shapes if names is None else names)], 1)

    def gram(self, other: "Directions | None" = None) -> Float[Tensor, "v w"]:
        """⟨u_v, u'_w⟩ for all pairs, from the factors' Gram matrices (eq. 9)."""
        other = self if other is None else other
        if self.shapes != other.shapes:
            raise ValueError("the two sets of directions are over different tensors")
        total: Tensor | None = None
        for name in self.shapes:
            mine, others = self._canonical(name), other._canonical(name)
            if len(mine) != len(others):
                mine, others = self.pair(name, [0]), other.pair(name, [0])
            if _better_formed([a.shape for a in mine], [b.shape for b in others]):
                mine, others = ([d.dense(name).reshape(d.n, 1, -1)] for d in (self, other))
            product: Tensor | None = None
            for a, b in zip(mine, others, strict=True):
                a, b = a.flatten(0, 1), b.flatten(0, 1)
                gram = _SelfGram.apply(a) if other is self else a @ b.T
                product = gram if product is None else product * gram
            assert product is not None
            if mine[0].shape[1] * others[0].shape[1] > 1:
                product = product.unflatten(1, others[0].shape[:2]).unflatten(0, mine[0].shape[:2]).sum((1, 3))
            total = product if total is None else total + product
        assert total is not None
        return total

    def _square_norms(self) -> dict[str, Float[Tensor, " v"]]:
        norms = {}
        for name in self.shapes:
            product: Tensor | float = 1.0
            for factor in self._canonical(name):
                # Terms that nearly cancel grow without bound in a direction that is not used: in single precision
                # what is left of their norms can come out as zero, and dividing by it ends the fit.
                wide = factor.double() if factor.shape[1] > 1 else factor
                product = product * (wide @ wide.mT)
            assert isinstance(product, Tensor)
            norms[name] = product.sum((1, 2)).clamp_min(0).to(self.factors[name][0].dtype)
        return norms

    def norms(self, by_tensor: bool = False) -> Float[Tensor, " v"] | Float[Tensor, "v tensors"]:
        """Each direction's norm over all tensors together, or its share in every tensor."""
        squares = torch.stack(list(self._square_norms().values()), -1)
        return squares.sqrt() if by_tensor else squares.sum(-1).sqrt()

    def cancellation(self) -> Float[Tensor, " v"]:
        """Σ_k ‖term k‖² over all tensors of every unit direction: about 1, and large where its CP terms cancel."""
        squares = [[factor.square().sum(-1) for factor in factors] for factors in self.factors.values()]
        return torch.stack([math.prod(axes, start=axes[0].new_ones(())).sum(1) for axes in squares]).sum(0)

    def _scale(self, name: str, scale: Float[Tensor, " v"]) -> None:
        factors = self.factors[name]
        for factor in factors if self.factorization == "cp" else factors[:1]:
            power = scale ** (1 / len(factors)) if self.factorization == "cp" else scale
            factor.mul_(power.view(-1, *[1] * (factor.ndim - 1)))

    @torch.no_grad()
    def normalize_(self) -> Self:
        """Scale every direction to unit norm over all tensors together, in place; no direction is formed."""
        scale = self.norms().clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
        for name in self.shapes:
            self._scale(name, scale)
        return self


class _SelfGram(torch.autograd.Function):
    """x xᵀ, whose two equal halves go back as one product."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "v d"]) -> Float[Tensor, "v v"]:
        ctx.save_for_backward(x)
        return x @ x.T

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return (grad[0] + grad[0].T) @ ctx.saved_tensors[0]


def _better_formed(mine: Sequence[torch.Size], others: Sequence[torch.Size]) -> bool:
    """Whether a tensor's Gram matrix costs less from formed directions than from factors (v, k, d), by operations."""
    (v, k, _), (w, j, _) = mine[0], others[0]
    size = math.prod(shape[2] for shape in mine)
    factored = v * k * w * j * sum(2 * shape[2] + NUMBER for shape in mine)
    return (v + w) / 2 * size * (v + w + k + j + NUMBER) < factored
