"""Which coefficients of a gradient are used to rebuild it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.support import parallel
from eigendecomp.support.checks import real


class Sparsity:
    """A rule that turns coefficients ``z`` into the sparse ``s``, and the term it adds to the loss."""

    auxiliary: float = 0.0  # weight of a second error, in which directions not kept for a while rebuild what is left

    def share(self, progress: float) -> float:
        """The share of a batch's coefficients that :meth:`keep_batch` keeps; one if it also changes what it keeps."""
        return 1.0

    def keep_batch(self, z: Float[Tensor, "n v"], progress: float) -> Float[Tensor, "n v"]:
        """s in the fit, where the rule may look at the whole batch; ``progress`` is the share of the steps done."""
        return z

    def keep(self, z: Float[Tensor, "n v"], threshold: float | None) -> Float[Tensor, "n v"]:
        """s at inference, where a sample's coefficients depend on that sample alone."""
        return z if threshold is None else z * (z.abs() >= threshold)

    def penalty(self, z: Float[Tensor, "n v"], n: int, norm: Float[Tensor, ""]) -> Float[Tensor, ""] | float:
        """These samples' share of the term added to a batch's error; ``norm`` is the RMS norm of its n gradients."""
        return 0.0

    def threshold(self, z: Iterable[Float[Tensor, "n v"]]) -> float | None:
        """The |z| kept at inference, from batches of training coefficients; None keeps all, and reads no batch."""
        return None


@dataclass(frozen=True)
class BatchTopK(Sparsity):
    """Keep the largest |z| of a batch: ``fraction`` of all its samples × directions coefficients.

    The fit starts by keeping all and comes down to ``fraction`` geometrically over the first ``warmup`` of its steps:
    two directions that settle on one feature while another has none are then rare (a cold start lost a feature of the
    toy model in 8 of 20 seeds, this in none). ``auxiliary`` weighs a second error in which directions that have not
    been kept for a while rebuild what the others leave, so that none stays dead.
    """

    fraction: float
    warmup: float = 0.3
    auxiliary: float = 1 / 16

    def __post_init__(self) -> None:
        real("BatchTopK: fraction (of the coefficients kept)", self.fraction, above=0, most=1)
        real("BatchTopK: warmup (share of the steps)", self.warmup, least=0, most=1)
        real("BatchTopK: auxiliary", self.auxiliary, least=0)

    def share(self, progress: float) -> float:
        done = 1.0 if progress >= self.warmup else progress / self.warmup
        return self.fraction**done

    def keep_batch(self, z: Tensor, progress: float) -> Tensor:
        fraction = self.share(progress)
        return z if fraction >= 1 else z * (z.abs() >= cutoff(z, fraction))

    def threshold(self, z: Iterable[Tensor]) -> float:
        return cutoff(torch.cat(list(z)), self.fraction).item()


def cutoff(z: Tensor, fraction: float) -> Tensor:
    """The smallest |z| that is kept when ``fraction`` of all coefficients are, over all processes."""
    count = max(1, round(fraction * z.numel() * parallel.processes()))
    size = z.detach().abs().flatten()
    # Whatever is among the largest of all is among the largest of its own process.
    candidates = parallel.gathered(size.topk(min(count, len(size)), sorted=False).values)
    return candidates.topk(count, sorted=False).values.min() if len(candidates) > count else candidates.min()


@dataclass(frozen=True)
class L1(Sparsity):
    """Keep every coefficient and add ``weight`` · mean ‖z‖₁ in units of the gradients' norm."""

    weight: float

    def __post_init__(self) -> None:
        real("L1: weight", self.weight, least=0)

    def penalty(self, z: Tensor, n: int, norm: Tensor) -> Tensor:
        return self.weight * z.abs().sum() / (n * norm)
