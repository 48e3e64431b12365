"""The two meanings of a sample: where the gradients of each come from, and how a fit gets batches of them."""

from collections.abc import Iterator

import torch

from eigendecomp.batches import Batches, CachedBatches, Data, LiveBatches
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.uses import HELD_BYTES, HeldUses, UseSource
from eigendecomp.settings import Settings
from eigendecomp.support.examples import Examples, Inputs, chunks, feed, fetch, first, kind
from eigendecomp.target import Target

CHUNK = 64  # examples read at a time
LITTLE = 1 << 21  # numbers; while the gradients of a chunk have fewer, more examples are read at a time


class OutputSamples:
    """A sample is one output: its gradient is over all uses of a weight."""

    def __init__(self, target: Target, examples: Examples, settings: Settings) -> None:
        self.source = self.outputs = CapturedSource(target, examples, terms=settings.n_directions * settings.rank)

    def batches(self, data: Data, order: torch.Generator) -> Batches:
        if data.cached:
            return CachedBatches(self.source, data.seen, data.outputs, data.draws, order)
        return LiveBatches(self.source, feed(data.inputs, order), data.draws, data.outputs.shape[1])


class UseSamples:
    """A sample is one use of a weight: its gradient is over all outputs."""

    def __init__(self, target: Target, examples: Examples, settings: Settings) -> None:
        self.outputs = CapturedSource(target, examples, terms=settings.n_directions * settings.rank, form=False)
        self.source = UseSource(self.outputs, examples, settings.scale == "unit")

    def batches(self, data: Data, order: torch.Generator) -> Batches:
        if data.count and data.draws.reference.fixed and self.source.bytes(data.count) <= HELD_BYTES:
            return HeldUses(self.source, fetch(data.inputs, range(data.count)), data.draws, order)
        positions = data.outputs.shape[1]
        return LiveBatches(self.source, feed(data.inputs, order), data.draws, positions, self.source.positions)


Samples = OutputSamples | UseSamples
SAMPLES: dict[str, type[Samples]] = {"outputs": OutputSamples, "uses": UseSamples}


def pieces(target: Target, inputs: Inputs, draws: int = 0) -> Iterator[Examples]:
    """The examples of a reading, ``CHUNK`` at a time, or up to eight times as many of them where gradients are small.

    ``draws`` is the number of cotangents of an output, as many as outputs if it is 0. References are drawn in order, so
    that no number depends on this but by rounding.
    """
    if kind(inputs) != "tensors":
        return chunks(inputs, CHUNK)
    p, k = target.outputs(first(inputs, 1)).shape[1:]
    return chunks(inputs, CHUNK * min(8, max(1, LITTLE // (CHUNK * p * (draws or k) * (k + target.size)))))
