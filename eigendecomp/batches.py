"""What a fit reads of its data, and batches of gradients: differentiated at every step, or from kept Jacobians."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from eigendecomp.gradients import EachOutput, Formed, Gradients, Source
from eigendecomp.reference import Draws
from eigendecomp.settings import Settings
from eigendecomp.support import parallel
from eigendecomp.support.checks import check_differs, usable
from eigendecomp.support.examples import Examples, Feed, Inputs, Shuffled, count, feed, fetch, first
from eigendecomp.support.random import generator
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target

CACHE_BYTES = 1 << 28  # a Jacobian up to this size is kept instead of being computed at every step
POOL_SAMPLES = 8192  # samples from whose outputs references are made, where there are more
CHUNK = 256  # examples differentiated at a time, where no loss is taken of them
ZERO = "does the output depend on the chosen parameters, and differ from the reference?"


@dataclass
class Data:
    """What a fit reads of its inputs."""

    inputs: Inputs
    count: int | None  # examples, where that is known
    probe: Examples  # the first three
    seen: Examples  # those from whose outputs references are made: all, where that is cheap
    outputs: Outputs  # of these
    draws: Draws
    cached: bool  # whether Jacobians of all are small enough to be kept

    @classmethod
    def read(cls, target: Target, inputs: Inputs, settings: Settings, pool_samples: int = POOL_SAMPLES) -> "Data":
        """Run the target on the inputs that references are made from.

        Raises:
            ValueError: if the divergence cannot compare the outputs, or no output differs from its reference.
        """
        s, probe = settings, first(inputs, 3)
        _, p, k = target.outputs(probe).shape
        s.divergence.check(k)
        n = count(inputs)
        size = p * (1 if s.reference.fixed else k) * target.size * torch.finfo(target.dtype).bits // 8
        cached = n is not None and n * size <= CACHE_BYTES
        some = math.ceil(pool_samples / p)
        if n and (cached or n <= some):
            seen = fetch(inputs, range(n))
        else:
            seen = feed(inputs, generator(s.seed, "pool")).take(some)
        f = Outputs.of(target, seen)
        draws = Draws.of(s.reference, s.divergence, s.pool(f), (1, 1), 1, generator(s.seed, "probe"))
        check_differs(draws, f.pieces(), generator(s.seed, "zero"), ZERO)
        return cls(inputs, n, probe, seen, f, draws, cached)


class Batches(Protocol):
    """Gives the gradients of a batch of samples with freshly drawn references."""

    @property
    def feed(self) -> Feed: ...

    def batch(self, size: int, generator: torch.Generator) -> Gradients: ...


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


class CachedBatches:
    """Differentiates the target once: a gradient is linear in the cotangent, g = Jᵀc, so J is all there is to keep.

    A fixed reference needs less, since the gradients themselves never change.
    """

    def __init__(
        self, source: Source, examples: Examples, outputs: Outputs, draws: Draws, generator: torch.Generator
    ) -> None:
        self.shapes, self.draws, (e, p, _), fixed = source.target.shapes, draws, outputs.shape, draws.reference.fixed
        self.f = torch.zeros(e * p, 0) if fixed else outputs.all().flatten(0, 1)
        c, pieces = draws.again((e, p), 1, generator) if fixed else EachOutput(), []
        for start in range(0, e, CHUNK):
            some = slice(start, start + CHUNK)
            pieces.append(source([tensor[some] for tensor in examples], c[some]).flat())
        self.jacobian = usable(torch.cat(pieces).view(len(self.f), -1, pieces[0].shape[-1]), ZERO)
        self.feed = Shuffled((self.f,), len(self.f), generator)

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        share = parallel.share(size)
        index = self.feed.indices(size)[share]
        gradients = self.jacobian.index_select(0, index)
        if not self.draws.reference.fixed:
            c = self.draws.again((size, 1), 1, generator)[share](self.f[index].unsqueeze(1))
            gradients = torch.bmm(c[:, 0], gradients)
        return Gradients(self.shapes, [Formed(self.shapes, gradients[:, 0])])
