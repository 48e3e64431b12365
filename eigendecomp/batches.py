"""Batches of gradients: differentiated at every step, or held."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from eigendecomp.gradients import Gradients, Source
from eigendecomp.reference import Draws
from eigendecomp.support import parallel
from eigendecomp.support.examples import Feed, Shuffled

ZERO = "does the output depend on the chosen parameters, and differ from the reference?"


@dataclass
class LiveBatches:
    """Differentiates the target at every step, on whole examples."""

    source: Source
    feed: Feed
    draws: Draws
    positions: int  # outputs of an example, each with a reference of its own
    samples: int = 0  # samples of an example; 0 for as many as outputs

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        examples = max(1, size // (self.samples or self.positions))
        draws = self.draws.again((examples, self.positions), 1, generator)
        return self.source(self.feed.take(examples), draws[parallel.share(examples)])


class HeldBatches:
    """Draws from gradients that are held, all alike.

    Args:
        some: gives those of chosen numbers; where their references are not held as well, drawn from a generator.
    """

    def __init__(
        self, count: int, some: Callable[[Int[Tensor, " n"], torch.Generator], Gradients], order: torch.Generator
    ) -> None:
        self.some, self.feed = some, Shuffled((torch.zeros(count),), count, order)

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        return self.some(self.feed.indices(size)[parallel.share(size)], generator)


Batches = LiveBatches | HeldBatches
