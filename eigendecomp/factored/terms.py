"""Gradients of one tensor as a sum of outer products, in whatever form is cheapest to compute with.

A weight that multiplies has the gradient Σ_t left_t ⊗ right_t, with one term for every position at which it is used:
on one side the output gradients, on the other the inputs. Inner products with low-rank directions and squared norms
follow from the two sides (eq. 10 and 11). Which way to go is decided for every tensor by counting operations.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from eigendecomp.directions import OPS_PER_ELEMENT, Directions
from eigendecomp.gradients import OWN, Formed, Part, sum_of

PASSES = 4  # encoder and decoder, each forward and backward, to one squared norm
WRITE = 10  # what adding a number to another costs beside products of large matrices, in operations: measured
FRESH = 1 << 21  # intermediate numbers at a time, where none of them stays


@dataclass
class Side:
    """One factor of Σ_t left_t ⊗ right_t: rows of numbers, or of positions in a vocabulary (one-hot rows).

    ``values`` is (c, e, t, d), with c = 1 where all cotangents of an example share it; a lookup's is (c, e, t) and
    holds −1 for padding. ``index`` says where the d entries lie within the ``size`` of the flattened axes.
    """

    values: Tensor
    size: int
    index: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many cotangents, examples and positions there are: (c, e, t)."""
        c, e, t = self.values.shape[:3]
        return c, e, t

    @property
    def lookup(self) -> bool:
        return self.values.ndim == 3

    @property
    def count(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Operations that an inner product with a row takes; a lookup's takes none."""
        return 0 if self.lookup else self.values.shape[-1]

    @property
    def norm_cost(self) -> float:
        """Operations of the inner products between all rows of every sample, as squared norms take them."""
        return 2 * self.count * self.shape[2] * self.width

    def within(self, factor: Float[Tensor, "v k size"]) -> Float[Tensor, "v k d"]:
        """The entries of a direction's factor that these rows meet."""
        return factor if self.index is None else factor[..., self.index]

    def dot(self, factor: Float[Tensor, "v k size"]) -> Float[Tensor, "c e t vk"]:
        """Inner products of every row with every direction's factor."""
        rows = self.within(factor).flatten(0, 1)
        if self.lookup:
            return F.embedding(self.values.clamp_min(0), rows.T) * (self.values >= 0).unsqueeze(-1)
        return self.values @ rows.T

    def dot_own(self, factor: Float[Tensor, "ecm k size"], draws: int) -> Float[Tensor, "e c t mk"]:
        """Inner products of every row with the factors of the directions that its sample has to itself."""
        e, k = self.shape[1], factor.shape[1]
        own = self.within(factor).reshape(e, draws, -1, k, factor.shape[-1] if self.index is None else len(self.index))
        own = own.flatten(2, 3)  # (e, c, m·k, d)
        values = self.values.transpose(0, 1)
        if self.lookup:
            tokens = values.expand(-1, draws, -1).unsqueeze(2).expand(-1, -1, own.shape[2], -1)
            return (own.gather(-1, tokens.clamp_min(0)) * (tokens >= 0)).mT
        if values.shape[1] == draws:
            return values @ own.mT
        return (values[:, 0] @ own.flatten(1, 2).mT).unflatten(2, (draws, -1)).transpose(1, 2)

    def gram(self, other: "Side") -> Float[Tensor, "c e t s"]:
        """Inner products between the rows of two sides."""
        if self.lookup and other.lookup:
            return (self.values.unsqueeze(-1) == other.values.unsqueeze(-2)) & (self.values >= 0).unsqueeze(-1)
        if self.lookup:
            return other.gram(self).mT
        if other.lookup:
            rows, chosen = self.full(), other.values.unsqueeze(-2)
            c = max(len(rows), len(chosen))
            chosen = chosen.expand(c, -1, rows.shape[2], -1)
            return rows.expand(c, -1, -1, -1).gather(-1, chosen.clamp_min(0)) * (chosen >= 0)
        a, b = (self.values, other.values) if self.index is other.index else (self.full(), other.full())
        if a.shape[2] == b.shape[2] == 1:
            return (a * b).sum(-1, keepdim=True)
        return a @ b.mT

    def disjoint(self, other: "Side") -> bool:
        """Whether the two meet different entries, so that all inner products are zero."""
        if self.index is None or other.index is None or self.index is other.index:
            return False
        return not torch.isin(self.index, other.index).any()

    def full(self) -> Float[Tensor, "c e t size"]:
        """The same rows over all ``size`` entries."""
        if self.lookup:
            return F.one_hot(self.values.clamp_min(0), self.size) * (self.values >= 0).unsqueeze(-1)
        if self.index is None:
            return self.values
        return self.values.new_zeros(*self.values.shape[:-1], self.size).index_copy(-1, self.index, self.values)

    def some(self, examples: slice | Int[Tensor, " m"]) -> "Side":
        """The rows of some of the examples."""
        return Side(self.values[:, examples], self.size, self.index)

    def first(self, examples: int) -> "Side":
        """The rows of the first examples."""
        return self if self.shape[1] == examples else self.some(slice(examples))

    def select(self, e: int, c: int) -> "Side":
        """The rows of one sample."""
        values = self.values[c if len(self.values) > 1 else 0, e]
        return Side(values[None, None], self.size, self.index)

    def by_position(self, positions: int, draws: int) -> "Side":
        """Rows of (draw, example · position) as rows of (position · draw, example), so that all sides agree."""
        values = self.values.expand(draws, *self.values.shape[1:]).unflatten(1, (-1, positions))
        return Side(values.movedim(2, 0).flatten(0, 1), self.size, self.index)

    @staticmethod
    def together(sides: "Sequence[Side]") -> "Side":
        """The rows of several sides of one kind."""
        first = sides[0]
        if len(sides) == 1:
            return first
        return Side(torch.cat([side.values for side in sides], 2), first.size, first.index)


class Patches(Side):
    """The patches of images that a convolution's kernel meets; none is unfolded where a convolution does as well.

    Args:
        images: padded, (e, n, channels, *sizes): n images for every example.
        kernel: the sizes of a kernel.
    """

    def __init__(
        self, images: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], size: int
    ) -> None:
        self.images, self.kernel, self.stride, self.dilation = images, kernel, stride, dilation
        self.size, self.index = size, None
        spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        sizes = zip(images.shape[3:], spans, stride, strict=True)
        self.places = [(length - span) // step + 1 for length, span, step in sizes]

    @property
    def values(self) -> Float[Tensor, "1 e t d"]:  # type: ignore[override]
        """The patches themselves, channel by channel."""
        step = self.images.stride()
        within = [along * d for along, d in zip(step[3:], self.dilation, strict=True)]
        across = [along * s for along, s in zip(step[3:], self.stride, strict=True)]
        e, n, channels = self.images.shape[:3]
        sizes = (e, n, channels, *self.kernel, *self.places)
        view = self.images.as_strided(sizes, (*step[:3], *within, *across), self.images.storage_offset())
        patches = view.reshape(e, n, self.width, -1)  # in the order in which memory is copied fastest
        return rearrange(patches, "e n d t -> 1 e (n t) d")

    @property
    def shape(self) -> tuple[int, int, int]:
        e, n = self.images.shape[:2]
        return 1, e, n * math.prod(self.places)

    @property
    def lookup(self) -> bool:
        return False

    @property
    def width(self) -> int:
        return self.images.shape[2] * math.prod(self.kernel)

    @property
    def summed_cost(self) -> float:
        """Operations of the inner products of patches as those of pixels, summed over the places of the kernel."""
        channels, *sizes = self.images.shape[2:]
        each = 2 * channels * math.prod(sizes) ** 2 + WRITE * self.shape[2] ** 2 * math.prod(self.kernel)
        return len(self.images) * each if self.images.shape[1] == 1 else math.inf

    @property
    def norm_cost(self) -> float:
        return min(self.summed_cost, super().norm_cost)

    def some(self, examples: slice | Int[Tensor, " m"]) -> "Patches":
        return Patches(self.images[examples], self.kernel, self.stride, self.dilation, self.size)

    def dot(self, factor: Float[Tensor, "v k size"]) -> Float[Tensor, "1 e t vk"]:
        """The images convolved with the directions' factors as kernels."""
        kernels = factor.flatten(0, 1).unflatten(1, (self.images.shape[2], *self.kernel))
        none = [0] * len(self.kernel)
        images, stride, dilation = self.images.flatten(0, 1), list(self.stride), list(self.dilation)
        met = torch.convolution(images, kernels, None, stride, none, dilation, False, none, 1)
        return rearrange(met, "(e n) vk ... -> 1 e (n ...) vk", e=len(self.images))

    def gram(self, other: Side) -> Float[Tensor, "1 e t s"]:
        """Inner products of patches: those of pixels, summed over the places of the kernel."""
        sizes, t = self.images.shape[3:], self.shape[2]
        if other is not self or self.norm_cost < self.summed_cost:
            return Side(self.values, self.size).gram(other)
        flat = self.images.flatten(3).squeeze(1)
        products = (flat.mT @ flat).unflatten(2, sizes).unflatten(1, sizes)
        total: Tensor | None = None
        for offset in itertools.product(*map(range, self.kernel)):
            moves = zip(offset, self.dilation, self.places, self.stride, strict=True)
            window = [slice(o * d, o * d + (places - 1) * s + 1, s) for o, d, places, s in moves]
            here = products[:, *window, *window]
            total = here.clone() if total is None else total.add_(here)
        assert total is not None
        return total.reshape(1, len(flat), t, t)


Term = tuple[Side, Side]


def contract(term: Term, left: Float[Tensor, "v k l"], right: Float[Tensor, "v k r"]) -> Float[Tensor, "c e v"]:
    """Σ_t Σ_k (left_t · L_k)(right_t · R_k), in the cheaper of two orders."""
    v, k = left.shape[:2]
    order = by_folding if folding_cost(term, v, k) < rows_cost(term, v, k) else by_rows
    examples = term[0].shape[1]
    size = max(1, FRESH * examples // (max(side.count for side in term) * v * k or 1))
    if torch.is_grad_enabled() or size >= examples:
        return order(term, left, right)
    # Without derivatives no intermediate number stays, so a few examples at a time take less memory and time.
    some = (slice(start, start + size) for start in range(0, examples, size))
    return torch.cat([order((term[0].some(few), term[1].some(few)), left, right) for few in some], 1)


def by_rows(term: Term, left: Float[Tensor, "v k l"], right: Float[Tensor, "v k r"]) -> Float[Tensor, "c e v"]:
    """Every row of both sides meets every direction."""
    (a, b), (v, k) = term, left.shape[:2]
    product = a.dot(left) * b.dot(right)
    if k > 1:
        return product.unflatten(-1, (v, k)).sum((2, 4))
    return product.squeeze(2) if product.shape[2] == 1 else product.sum(2)


def rows_cost(term: Term, v: float, k: int) -> float:
    """Operations of :func:`by_rows` for v directions of rank k."""
    products = sum(2 * side.count * side.width for side in term)
    return v * k * (products + OPS_PER_ELEMENT * max(side.count for side in term))


def own_cost(term: Term, m: float, k: int) -> float:
    """Operations of inner products with m directions of rank k that each sample has to itself, and must be given."""
    samples = max(math.prod(side.shape[:2]) for side in term)
    given = sum(side.size if side.index is None else len(side.index) for side in term)
    return OWN * rows_cost(term, m, k) + 2 * OPS_PER_ELEMENT * samples * m * k * given


def by_folding(term: Term, left: Float[Tensor, "v k l"], right: Float[Tensor, "v k r"]) -> Float[Tensor, "c e v"]:
    """The side that an example's cotangents share meets the directions first, once for all of them."""
    (a, b), (v, k) = term, left.shape[:2]
    shared, own, first, second = (a, b, left, right) if a.shape[0] == 1 else (b, a, right, left)
    met = shared.dot(first)[0].unflatten(-1, (v, k)).transpose(1, 2)  # (e, v, t, k)
    folded = (met @ own.within(second)).flatten(2)  # (e, v, t·d)
    return (folded @ own.values.flatten(2).permute(1, 2, 0)).permute(2, 0, 1)


def folding_cost(term: Term, v: float, k: int) -> float:
    """Operations of :func:`by_folding`; infinite where there is no such side."""
    shared, own = term if term[0].shape[0] == 1 else term[::-1]
    if shared.shape[0] > 1 or own.shape[0] == 1 or own.lookup:
        return float("inf")
    (c, e, t), d = own.shape, own.width
    return e * t * v * (2 * k * (shared.width + d) + (2 * c + OPS_PER_ELEMENT) * d)


class Factored(Part):
    """Gradients of one tensor as Σ over uses and positions of left ⊗ right; formed only where that is cheaper.

    Args:
        left_axes: the axes of the tensor that the left side runs over.
    """

    def __init__(self, name: str, shape: tuple[int, ...], left_axes: tuple[int, ...], terms: Sequence[Term]) -> None:
        self.names = (name,)
        self.shape, self.left_axes, self.terms = shape, left_axes, list(terms)
        self.formed: Formed | None = None

    @classmethod
    def zero(cls, name: str, shape: tuple[int, ...], none: Float[Tensor, "c e 0"]) -> "Factored":
        """The gradients of a parameter that is never used: a sum of no terms."""
        left, right = (Side(none.new_zeros(*none.shape, d), d) for d in (shape[0], math.prod(shape[1:])))
        return cls(name, shape, (0,), [(left, right)])

    def __len__(self) -> int:
        return len(self.formed) if self.formed is not None else self.draws * self.terms[0][0].shape[1]

    def inner(self, directions: Directions) -> Float[Tensor, "n v"]:
        """Eq. 10."""
        if self.formed is None and (
            not directions.tensor[self.names[0]].splits(self.left_axes)
            or self.better_formed(directions.n, directions.tensor[self.names[0]].terms)
        ):
            self.form()
        if self.formed is not None:
            return self.formed.inner(directions)
        left, right = directions.pair(self.names[0], self.left_axes)
        return sum_of([contract(term, left, right) for term in self.terms]).transpose(0, 1).flatten(0, 1)

    def inner_own(self, own: Directions) -> Float[Tensor, "n m"]:
        """Eq. 10 with directions that each sample has to itself."""
        if self.formed is None and not own.tensor[self.names[0]].splits(self.left_axes):
            self.form()
        if self.formed is not None:
            return self.formed.inner_own(own)
        left, right = own.pair(self.names[0], self.left_axes)
        product = [a.dot_own(left, self.draws) * b.dot_own(right, self.draws) for a, b in self.terms]
        return sum_of([one.sum(2).unflatten(2, (-1, left.shape[1])).sum(3) for one in product]).flatten(0, 1)

    def operations(self, directions: Directions, v: float) -> float:
        if self.formed is not None:
            return self.formed.operations(directions, v)
        k = directions.tensor[self.names[0]].terms
        return sum(min(rows_cost(term, v, k), folding_cost(term, v, k)) for term in self.terms)

    def operations_own(self, directions: Directions, m: float) -> float:
        if self.formed is not None:
            return self.formed.operations_own(directions, m)
        return sum(own_cost(term, m, directions.tensor[self.names[0]].terms) for term in self.terms)

    @property
    def draws(self) -> int:
        """How many cotangents an example has."""
        return max(side.shape[0] for term in self.terms for side in term)

    def square_norms(self) -> Float[Tensor, " n"]:
        """Eq. 11: Σ_{t,s} (left_t · left_s)(right_t · right_s), over all pairs of uses."""
        if self.formed is not None:
            return self.formed.square_norms()
        total = []
        for i, (a, b) in enumerate(self.terms):
            for c, d in self.terms[: i + 1]:
                if not (a.disjoint(c) or b.disjoint(d)):
                    product = (a.gram(c) * b.gram(d)).sum((-2, -1))
                    total.append(product if a is c else 2 * product)
        return sum_of(total).T.flatten()

    def better_formed(self, v: int, k: int) -> bool:
        """Whether numbers, samples × parameters, cost less than the factors do, for v directions of rank k."""
        weights, counts = math.prod(self.shape), [max(a.count, b.count) for a, b in self.terms]
        n = counts[0] // max(self.terms[0][0].shape[2], 1)
        factored = PASSES * sum(min(rows_cost(term, v, k), folding_cost(term, v, k)) for term in self.terms)
        factored += sum(side.norm_cost for term in self.terms for side in term)
        formed = PASSES * weights * (2 * v * (n + k) + OPS_PER_ELEMENT * (n + v)) + 2 * sum(counts) * weights
        return formed < factored

    def form(self) -> None:
        """Give up the factors for numbers."""
        name = self.names[0]
        self.formed = Formed({name: self.shape}, self.dense()[name].flatten(1))
        self.terms = []

    def dense(self) -> dict[str, Float[Tensor, "n *shape"]]:
        if self.formed is not None:
            return self.formed.dense()
        dtype = next(side.values.dtype for side in self.terms[0] if not side.lookup)
        matrix = sum_of([_outer(a.full().to(dtype), b.full().to(dtype)) for a, b in self.terms])
        return {self.names[0]: self._tensors(matrix.transpose(0, 1).flatten(0, 1))}

    def _tensors(self, matrices: Float[Tensor, "n l r"]) -> Float[Tensor, "n *shape"]:
        """Matrices of the left by the right side, in the order of the tensor's own axes."""
        order = [*self.left_axes, *(axis for axis in range(len(self.shape)) if axis not in self.left_axes)]
        tensor = matrices.reshape(-1, *(self.shape[axis] for axis in order))
        return tensor.permute(0, *(1 + order.index(axis) for axis in range(len(order))))

    def weighted(self, weights: Float[Tensor, " n"]) -> dict[str, Float[Tensor, "*shape"]]:
        if self.formed is not None:
            return self.formed.weighted(weights)
        by_draw = weights.view(self.terms[0][0].shape[1], -1).T  # samples are ordered example by example
        total = sum_of([_weighted_outer(a, b, by_draw) for a, b in self.terms])
        return {self.names[0]: self._tensors(total[None])[0]}

    def sample(self, n: int) -> "Factored | Formed":
        """The gradient of one sample alone."""
        if self.formed is not None:
            return self.formed.sample(n)
        e, c = divmod(n, self.draws)
        own = [(a.select(e, c), b.select(e, c)) for a, b in self.terms]
        return Factored(self.names[0], self.shape, self.left_axes, own)


def _weighted_outer(a: Side, b: Side, weights: Float[Tensor, "c e"]) -> Float[Tensor, "l r"]:
    """Σ_{c,e} weight_ce Σ_t a_t ⊗ b_t; rows that all cotangents share are met by the sum over cotangents."""
    if b.lookup or a.shape[0] > b.shape[0]:
        return _weighted_outer(b, a, weights).T
    own, scaled = a.values, b.values
    scaled = weights.to(scaled)[..., None, None] * scaled
    if len(own) == 1:
        scaled = scaled.sum(0, keepdim=True)
    else:
        own = own.expand(len(weights), *own.shape[1:])
    left, right = own.flatten(0, 2), scaled.flatten(0, 2)
    if a.lookup:
        right = right * (left >= 0).unsqueeze(-1)
        matrix = right.new_zeros(a.size, right.shape[-1]).index_add_(0, left.clamp_min(0), right)
    else:
        matrix = left.T.to(right) @ right
        if a.index is not None:
            matrix = matrix.new_zeros(a.size, right.shape[-1]).index_add_(0, a.index, matrix)
    return matrix if b.index is None else matrix.new_zeros(len(matrix), b.size).index_add_(1, b.index, matrix)


def _outer(a: Float[Tensor, "c e t l"], b: Float[Tensor, "d e t r"]) -> Float[Tensor, "m e l r"]:
    """Σ_t a_t ⊗ b_t; a side that all cotangents share is met by all of them at once, and not copied for each."""
    if len(a) > len(b):
        every = a.permute(1, 0, 3, 2).flatten(1, 2) @ b[0]
        return every.unflatten(1, (len(a), -1)).transpose(0, 1)
    return _outer(b, a).mT if len(b) > len(a) else a.mT @ b
