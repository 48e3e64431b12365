"""The objective: how well a batch's gradients are rebuilt from few directions (eq. 7).

Most coefficients of a sparse batch are zero, and a zero coefficient has no derivative. Where that saves operations,
only products of samples with the directions kept for them are differentiated; the numbers are the same.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eigendecomp.directions import NUMBER, Directions
from eigendecomp.gradients import Gradients, Products, sum_of, terms_of
from eigendecomp.sparsity import Sparsity
from eigendecomp.support import parallel

CANCELLATION = 1e-2  # weight against CP terms that grow and cancel, from twice the squares they need
UNEVEN = 4  # the most coefficients that are kept of one sample, over the mean: a guess, until they are counted
PASSES = 3  # a product, and its two derivatives


def squared_error(
    squares: Float[Tensor, "*n"],
    s: Float[Tensor, "n m"],
    y: Float[Tensor, "n m"],
    gram: Float[Tensor, "m m"] | Float[Tensor, "n m m"],
) -> Float[Tensor, ""]:
    """Σ‖g − ĝ‖² with ‖g − ĝ‖² = ‖g‖² − 2 s·y + sᵀ gram s (eq. 7, before it is divided by Σ‖g‖²).

    Args:
        squares: ‖g‖² of every sample.
        s: coefficients from which ĝ is rebuilt.
        y: ⟨g, u⟩ with the decoder's directions.
        gram: inner products of these directions; of each sample's own, where samples have directions of their own.
    """
    return squares.sum() + (((s.unsqueeze(-2) @ gram).squeeze(-2) - 2 * y) * s).sum()


class Coefficients(Protocol):
    """A batch's coefficients and the products that :func:`squared_error` takes."""

    z: Float[Tensor, "n v"]
    kept: Float[Tensor, "n v"]  # z where it is kept, zero elsewhere
    s: Float[Tensor, "n m"]
    y: Float[Tensor, "n m"]
    gram: Tensor
    squares: Float[Tensor, " n"]

    def of_residual(
        self, rule: Sparsity, dead: Bool[Tensor, " v"]
    ) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"], Tensor]:
        """s, y and gram with which the dead directions rebuild the residual e = g − ĝ.

        Of the residual only ⟨e, u⟩ = ⟨g, u⟩ − s·gram is needed. It has no derivative: the directions that leave it
        learn nothing from how it is rebuilt.
        """
        ...


class Everything(Coefficients):
    """All coefficients, with derivatives: s, y (n, v) and gram (v, v)."""

    def __init__(self, products: Products, kept: Float[Tensor, "n v"], decoder: Directions) -> None:
        self.z, self.y, self.gram, self.squares = products
        self.s = self.kept = kept
        self.decoder = decoder

    def of_residual(self, rule: Sparsity, dead: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        few, rest = self.decoder.select(dead.nonzero()[:, 0]), self.decoder.map(Tensor.detach)
        s = rule.keep_batch(self.z[:, dead], 1.0)
        return s, self.y[:, dead] - self.s.detach() @ rest.gram(few), few.gram()


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


def coefficients(
    rule: Sparsity, gradients: Gradients, encoder: Directions, decoder: Directions, progress: float
) -> Coefficients:
    """A batch's coefficients in the way that takes fewer operations."""
    if not saves(gradients, encoder, decoder, UNEVEN * rule.share(progress) * encoder.n):
        products = gradients.products(encoder, decoder)
        return Everything(products, rule.keep_batch(products.z, progress), decoder)
    with torch.no_grad():
        z = gradients.inner(encoder)
    kept = rule.keep_batch(z, progress)
    m = int((kept != 0).sum(1).max())
    if saves(gradients, encoder, decoder, m):
        return KeptAlone(gradients, encoder, decoder, z, kept, m)
    products = gradients.products(encoder, decoder)
    return Everything(products, products.z * (kept != 0), decoder)


def saves(gradients: Gradients, encoder: Directions, decoder: Directions, m: float) -> bool:
    """Whether it takes fewer operations to differentiate products with m directions a sample than with all."""
    if m >= decoder.n:
        return False
    own = gradients.operations_own(decoder, m)
    if own == float("inf"):
        return False
    sets, v, n = 1 if encoder is decoder else 2, decoder.n, len(gradients)
    one, pair = gradients.operations(decoder), gram_operations(decoder)
    everything = PASSES * (sets * one + v * v * (pair + 2 * n))
    return one + PASSES * (sets * own + n * m * m * (pair + 2)) < everything


def gram_operations(directions: Directions) -> float:
    """Operations that one inner product of two directions takes."""
    return sum(
        terms_of(directions, name) ** 2 * sum(2 * d + NUMBER for d in shape)
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
        sides = list(zip(mine.pair(name, [0]), others.pair(name, [0]), strict=True))
        left, right = (a.reshape(n, -1, a.shape[2]) @ b.reshape(n, -1, b.shape[2]).mT for a, b in sides)
        a, b = sides[0]
        grams.append((left * right).unflatten(2, (-1, b.shape[1])).unflatten(1, (-1, a.shape[1])).sum((2, 4)))
    return sum_of(grams)


@dataclass
class Objective:
    """The loss of a batch (eq. 7), and what else the loop wants to know."""

    sparsity: Sparsity

    def __call__(
        self, gradients: Gradients, encoder: Directions, decoder: Directions, dead: Tensor, progress: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, normalised error of the batch, and the sparse coefficients (n, v).

        With several processes loss and error are this one's parts: over all processes they add up to the batch's.
        ``progress`` is the share of the steps done.
        """
        batch = coefficients(self.sparsity, gradients, encoder, decoder, progress)
        sums = parallel.sums(batch.squares.sum())
        left, n = squared_error(batch.squares, batch.s, batch.y, batch.gram), len(batch.z) * parallel.processes()
        total = sums()[0]
        total = total.where(total >= torch.finfo(total.dtype).tiny, 1)  # without gradients there is no error
        error = left / total
        loss = error + self.sparsity.penalty(batch.z, n, (total / n).sqrt())
        if self.sparsity.auxiliary and dead.any():
            loss = loss + self.sparsity.auxiliary * self.revival(batch, dead, error) / total
        if decoder.sums_terms:
            # A best CP fit need not exist: terms can grow without bound against each other (de Silva and Lim, 2008).
            excess = (decoder.cancellation() - 2).clamp_min(0).mean()
            loss = loss + CANCELLATION * excess / parallel.processes()
        return loss, error, batch.kept.detach()

    def revival(self, batch: Coefficients, dead: Bool[Tensor, " v"], error: Tensor) -> Float[Tensor, ""]:
        """Σ‖e − ê‖² − Σ‖e‖² of the residual e = g − ĝ that dead directions rebuild, over its share of Σ‖g‖²."""
        residual = parallel.sums(error)
        left = squared_error(torch.zeros_like(error), *batch.of_residual(self.sparsity, dead))
        return left / residual()[0].clamp_min(1e-6)
