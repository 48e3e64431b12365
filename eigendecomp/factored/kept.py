"""Derivatives for kept coefficients alone.

Most coefficients of a sparse batch are zero, and a zero coefficient has no derivative. Where that takes fewer
operations, all coefficients are computed without derivatives, and then the products of samples with the directions that
are kept for them once more, with derivatives. The numbers are those of :class:`eigendecomp.objective.Coefficients`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eigendecomp.directions import OPS_PER_ELEMENT, Directions
from eigendecomp.gradients import Gradients, sum_of
from eigendecomp.objective import Coefficients
from eigendecomp.sparsity import Sparsity

UNEVEN = 4  # the most coefficients that are kept of one sample, over the mean: a guess, until they are counted
LEAST = 200  # directions of which fewer save nothing, so that operations need not be counted: measured
PASSES = 3  # a product, and its two derivatives


class KeptAlone(Coefficients):
    """Derivatives for kept coefficients alone: s, y (n, m) and gram (n, m, m), m being the most of one sample.

    Samples of which fewer are kept have further directions with s = 0.
    """

    def __init__(
        self, gradients: Gradients, encoder: Directions, decoder: Directions, z: Tensor, kept: Tensor, m: int
    ) -> None:
        self.gradients, self.encoder, self.decoder = gradients, encoder, decoder
        self.z, self.kept, self.squares = z, kept, gradients.square_norms()
        self.s, self.y, self.own = self.products(*largest(kept, m))
        self.gram = gram_within(self.own, self.own, len(z))

    def products(
        self, numbers: Int[Tensor, "n m"], present: Bool[Tensor, "n m"]
    ) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"], Directions]:
        """s and y of chosen directions of every sample, and these of the decoder."""
        own = self.decoder.select(numbers.flatten())
        y = self.gradients.inner_own(own)
        if self.encoder is self.decoder:
            return y * present, y, own
        return self.gradients.inner_own(self.encoder.select(numbers.flatten())) * present, y, own

    def of_residual(self, rule: Sparsity, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, kept = len(self.z), rule.keep_batch(self.z[:, dead], 1.0)
        index, present = largest(kept, int((kept != 0).sum(1).max()))
        s, y, few = self.products(dead.nonzero()[:, 0][index], present)
        rebuilt = self.s.detach().unsqueeze(1) @ gram_within(self.own.map(Tensor.detach), few, n)
        return s, y - rebuilt.squeeze(1), gram_within(few, few, n)


def everything(
    rule: Sparsity, gradients: Gradients, encoder: Directions, decoder: Directions, progress: float
) -> Coefficients:
    """A batch's coefficients, all with derivatives; ``progress`` is the share of the steps done."""
    products = gradients.products(encoder, decoder)
    return Coefficients(products, rule.keep_batch(products.z, progress), decoder)


def coefficients(
    rule: Sparsity, gradients: Gradients, encoder: Directions, decoder: Directions, progress: float
) -> Coefficients:
    """A batch's coefficients in the way that takes fewer operations."""
    if not saves(gradients, encoder, decoder, UNEVEN * rule.share(progress) * encoder.n):
        return everything(rule, gradients, encoder, decoder, progress)
    with torch.no_grad():
        z = gradients.inner(encoder)
    kept = rule.keep_batch(z, progress)
    m = int((kept != 0).sum(1).max())
    if saves(gradients, encoder, decoder, m):
        return KeptAlone(gradients, encoder, decoder, z, kept, m)
    products = gradients.products(encoder, decoder)
    return Coefficients(products, products.z * (kept != 0), decoder)


def saves(gradients: Gradients, encoder: Directions, decoder: Directions, m: float) -> bool:
    """Whether it takes fewer operations to differentiate products with m directions a sample than with all."""
    if decoder.n < LEAST or m >= decoder.n:
        return False
    own = sum(part.operations_own(decoder, m) for part in gradients.parts)
    if own == float("inf"):
        return False
    sets, v, n = 1 if encoder is decoder else 2, decoder.n, len(gradients)
    one, pair = sum(part.operations(decoder, v) for part in gradients.parts), gram_operations(decoder)
    dense = PASSES * (sets * one + v * v * (pair + 2 * n))
    return one + PASSES * (sets * own + n * m * m * (pair + 2)) < dense


def gram_operations(directions: Directions) -> float:
    """Operations that one inner product of two directions takes."""
    return sum(
        directions.tensor[name].terms ** 2 * sum(2 * d + OPS_PER_ELEMENT for d in shape)
        for name, shape in directions.shapes.items()
    )


def largest(kept: Float[Tensor, "n v"], m: int) -> tuple[Int[Tensor, "n m"], Bool[Tensor, "n m"]]:
    """The m largest coefficients of every sample: where they are, and which of them are kept."""
    values, index = kept.abs().topk(m, 1, sorted=False)
    return index, values > 0


def gram_within(mine: Directions, others: Directions, n: int) -> Float[Tensor, "n m j"]:
    """Inner products between the directions of each of n samples, which are given sample by sample."""
    grams = []
    for name in mine.shapes:
        axes = mine.tensor[name].first
        sides = list(zip(mine.pair(name, axes), others.pair(name, axes), strict=True))
        left, right = (a.reshape(n, -1, a.shape[2]) @ b.reshape(n, -1, b.shape[2]).mT for a, b in sides)
        a, b = sides[0]
        grams.append((left * right).unflatten(2, (-1, b.shape[1])).unflatten(1, (-1, a.shape[1])).sum((2, 4)))
    return sum_of(grams)
