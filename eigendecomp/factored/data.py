"""What a fit reads of its inputs before it starts, as much as memory allows."""

import math
from dataclasses import dataclass

import torch

from eigendecomp.batches import ZERO
from eigendecomp.reference import Draws
from eigendecomp.settings import Settings
from eigendecomp.support.checks import check_differs
from eigendecomp.support.examples import Examples, Inputs, count, feed, fetch, first
from eigendecomp.support.random import generator
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target

CACHE_BYTES = 1 << 28  # a Jacobian up to this size is kept instead of being computed at every step
POOL_SAMPLES = 8192  # samples from whose outputs references are made, where there are more


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
