"""The objective: how well a batch's gradients are rebuilt from few directions (eq. 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eigendecomp.directions import Directions
from eigendecomp.gradients import Gradients
from eigendecomp.sparsity import BatchTopK, Sparsity
from eigendecomp.support import parallel

CANCELLATION = 1e-2  # weight against CP terms that grow and cancel, from twice the squares they need


@dataclass
class Objective:
    """The normalised error of a batch, and what else the loop wants to know (eq. 7)."""

    sparsity: Sparsity

    def __call__(
        self, gradients: Gradients, encoder: Directions, decoder: Directions, dead: Tensor, progress: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, normalised error of the batch, and the sparse coefficients (n, v).

        With several processes loss and error are this one's parts: over all processes they add up to the batch's.
        ``progress`` is the share of the steps done.
        """
        norms = parallel.sums(gradients.square_norms().sum())
        z, y, gram = gradients.inner_and_gram(encoder, decoder)
        n = len(z) * parallel.processes()
        s = self.sparsity.keep_batch(z, progress)
        # A batch of sparse data may have no gradient at all; it then has no say.
        total = norms()[0].clamp_min(torch.finfo(y.dtype).tiny)
        error = 1 / parallel.processes() + error_change(s, y, gram) / total
        loss = error + self.sparsity.penalty(z, n, (total / n).sqrt())
        if isinstance(self.sparsity, BatchTopK) and self.sparsity.auxiliary and dead.any():
            # The dead rebuild the residual e = g − ĝ, of which only ⟨e, u⟩ = ⟨g, u⟩ − s·gram and ‖e‖² are needed.
            # The residual is given: the live directions that leave it learn nothing from this.
            residual = parallel.sums(error)
            few, rest = decoder.select(dead.nonzero()[:, 0]), decoder.map(Tensor.detach)
            s_dead = self.sparsity.keep_batch(z[:, dead], 1.0)
            y_dead = y[:, dead] - s.detach() @ rest.gram(few)
            left = error_change(s_dead, y_dead, few.gram()) / (residual()[0].clamp_min(1e-6) * total)
            loss = loss + self.sparsity.auxiliary * left
        if decoder.sums_terms:
            # A best CP fit need not exist: terms can grow without bound against each other (de Silva and Lim, 2008).
            excess = (decoder.cancellation() - 2).clamp_min(0).mean()
            loss = loss + CANCELLATION * excess / parallel.processes()
        return loss, error, s


def error_change(s: Tensor, y: Tensor, gram: Tensor) -> Tensor:
    """Σ‖g − ĝ‖² − Σ‖g‖² from s, y = ⟨g, u⟩ and the directions' Gram matrix: sᵀ gram s − 2 s·y (eq. 7)."""
    return (((s @ gram) - 2 * y) * s).sum()
