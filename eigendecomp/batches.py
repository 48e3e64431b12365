"""Batches of gradients: differentiated at every step, or from Jacobians that are kept."""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.gradients import EachOutput, Formed, Gradients, Source
from eigendecomp.reference import Draws, Reference
from eigendecomp.support import parallel
from eigendecomp.support.examples import Examples, Feed, Shuffled
from eigendecomp.target import Target

CACHE_BYTES = 1 << 28  # a Jacobian up to this size is kept instead of being computed at every step
ZERO = "does the output depend on the chosen parameters, and differ from the reference?"


class Batches(Protocol):
    """Gives the gradients of a batch of samples with freshly drawn references."""

    @property
    def feed(self) -> Feed: ...

    def batch(self, size: int, generator: torch.Generator) -> Gradients: ...


class LiveBatches:
    """Differentiates the target at every step, on whole examples.

    Args:
        positions: outputs of an example, each with a reference of its own.
        samples: samples of an example; 0 for as many as outputs.
    """

    def __init__(self, source: Source, feed: Feed, draws: Draws, positions: int, samples: int = 0) -> None:
        self.source, self.feed, self.draws, self.positions = source, feed, draws, positions
        self.samples = samples or positions

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        count = max(1, size // self.samples)
        draws = self.draws.again((count, self.positions), 1, generator)
        return self.source(self.feed.take(count), draws[parallel.share(count)])


class CachedBatches:
    """Differentiates the target once: a gradient is linear in the cotangent, g = Jᵀc, so J is all there is to keep.

    A fixed reference needs less, since the gradients themselves never change.
    """

    def __init__(
        self, source: Source, examples: Examples, f: Float[Tensor, "e p k"], draws: Draws, generator: torch.Generator
    ) -> None:
        self.shapes, self.draws, self.f = source.target.shapes, draws, f.flatten(0, 1)
        basis = draws.again((f.shape[0], f.shape[1]), 1, generator) if draws.reference.fixed else EachOutput()
        rows = []
        for start in range(0, len(f), 256):
            part = slice(start, start + 256)
            rows.append(source([tensor[part] for tensor in examples], basis[part]).flat())
        self.jacobian = torch.cat(rows).view(len(self.f), -1, rows[0].shape[-1])
        if not self.jacobian.isfinite().all():
            bad = ~self.jacobian.isfinite().flatten(1).all(1)
            raise ValueError(
                f"the gradient is NaN or infinite for {int(bad.sum())} of {len(bad)} samples, first for sample "
                f"{int(bad.nonzero()[0])}; remove those examples, or smooth the model where it has no slope"
            )
        if not self.jacobian.any():
            raise ValueError(f"all gradients are zero: {ZERO}")
        self.feed = Shuffled((self.f,), len(self.f), generator)

    @staticmethod
    def size(f: Float[Tensor, "e p k"], examples: int, reference: Reference, target: Target) -> int:
        """Bytes that the cache of so many examples takes, told from the outputs of a few."""
        k = 1 if reference.fixed else f.shape[-1]
        return examples * f.shape[1] * k * target.size * f.element_size()

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        share = parallel.share(size)
        rows = self.feed.indices(size)[share]
        jacobian = self.jacobian[rows]
        if self.draws.reference.fixed:
            values = jacobian[:, 0]
        else:
            c = self.draws.again((size, 1), 1, generator)[share](self.f[rows].unsqueeze(1))
            values = torch.bmm(c[:, 0], jacobian)[:, 0]
        return Gradients(self.shapes, [Formed(self.shapes, values)])
