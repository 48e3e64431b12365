"""The objective: how well a batch's gradients are rebuilt from few directions (eq. 7)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigendecomp.directions import Directions
from eigendecomp.gradients import Products
from eigendecomp.sparsity import Sparsity
from eigendecomp.support import parallel

CANCELLATION = 1e-2  # weight against CP terms that grow and cancel, from twice the squares they need


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


class Coefficients:
    """A batch's coefficients, all with derivatives, and the products that :func:`squared_error` takes."""

    def __init__(self, products: Products, kept: Float[Tensor, "n v"], decoder: Directions) -> None:
        self.z, self.y, self.gram, self.squares = products
        self.s = self.kept = kept  # z where it is kept, zero elsewhere
        self.decoder = decoder

    def of_residual(self, rule: Sparsity, dead: Bool[Tensor, " v"]) -> tuple[Tensor, Tensor, Tensor]:
        """s, y (n, m) and gram with which the dead directions rebuild the residual e = g − ĝ.

        Of the residual only ⟨e, u⟩ = ⟨g, u⟩ − s·gram is needed. It has no derivative: the directions that leave it
        learn nothing from how it is rebuilt.
        """
        few, rest = self.decoder.select(dead.nonzero()[:, 0]), self.decoder.map(Tensor.detach)
        s = rule.keep_batch(self.z[:, dead], 1.0)
        return s, self.y[:, dead] - self.s.detach() @ rest.gram(few), few.gram()


def loss_and_error(
    rule: Sparsity, batch: Coefficients, dead: Bool[Tensor, " v"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss of a batch, and its normalised error Σ‖g − ĝ‖² / Σ‖g‖² (eq. 7).

    With several processes both are this one's terms: over all processes they add up to the batch's.
    """
    sums = parallel.sums(batch.squares.sum())
    left, n = squared_error(batch.squares, batch.s, batch.y, batch.gram), len(batch.z) * parallel.processes()
    total = sums()[0]
    # If every gradient in the batch is zero, the error is zero too, with zero derivative.
    total = total.where(total >= torch.finfo(total.dtype).tiny, 1)
    error = left / total
    loss = error + rule.penalty(batch.z, n, (total / n).sqrt())
    if rule.auxiliary and dead.any():
        loss = loss + rule.auxiliary * revival(rule, batch, dead, error) / total
    if batch.decoder.sums_terms:
        # A best CP fit need not exist: terms can grow without bound against each other (de Silva and Lim, 2008).
        excess = (batch.decoder.cancellation() - 2).clamp_min(0).mean()
        loss = loss + CANCELLATION * excess / parallel.processes()
    return loss, error


def revival(rule: Sparsity, batch: Coefficients, dead: Bool[Tensor, " v"], error: Tensor) -> Float[Tensor, ""]:
    """Σ‖e − ê‖² − Σ‖e‖² of the residual e = g − ĝ that dead directions rebuild, over its share of Σ‖g‖²."""
    residual = parallel.sums(error)
    left = squared_error(torch.zeros_like(error), *batch.of_residual(rule, dead))
    return left / residual()[0].clamp_min(1e-6)
