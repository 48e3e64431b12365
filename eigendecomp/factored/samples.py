"""The two meanings of a sample: where the gradients of each come from, and how a fit gets batches of them."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from eigendecomp.batches import ZERO, Batches, HeldBatches, LiveBatches
from eigendecomp.factored.data import Data
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.uses import HELD_BYTES, UseSource, held_uses
from eigendecomp.gradients import EachOutput, Formed, Gradients, Source
from eigendecomp.reference import Draws
from eigendecomp.settings import Settings
from eigendecomp.support import parallel
from eigendecomp.support.checks import usable
from eigendecomp.support.examples import Examples, Inputs, chunks, feed, fetch, first, kind
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target

FORMED = 256  # examples differentiated at a time, where gradients are formed and held
CHUNK = 64  # examples read at a time
LITTLE = 1 << 21  # numbers; while the gradients of a chunk have fewer, more examples are read at a time


class OutputSamples:
    """A sample is one output: its gradient is over all uses of a weight."""

    def __init__(self, target: Target, examples: Examples, settings: Settings) -> None:
        self.source = self.outputs = CapturedSource(target, examples, terms=settings.n_directions * settings.rank)

    def batches(self, data: Data, order: torch.Generator) -> Batches:
        if data.cached:
            return held_gradients(self.source, data.seen, data.outputs, data.draws, order)
        return LiveBatches(self.source, feed(data.inputs, order), data.draws, data.outputs.shape[1])


class UseSamples:
    """A sample is one use of a weight: its gradient is over all outputs."""

    def __init__(self, target: Target, examples: Examples, settings: Settings) -> None:
        self.outputs = CapturedSource(target, examples, terms=settings.n_directions * settings.rank, form=False)
        self.source = UseSource(self.outputs, examples, settings.scale == "unit")

    def batches(self, data: Data, order: torch.Generator) -> Batches:
        if data.count and data.draws.reference.fixed and self.source.bytes(data.count) <= HELD_BYTES:
            return held_uses(self.source, fetch(data.inputs, range(data.count)), data.draws, order)
        positions = data.outputs.shape[1]
        return LiveBatches(self.source, feed(data.inputs, order), data.draws, positions, self.source.positions)


Samples = OutputSamples | UseSamples
SAMPLES: dict[str, type[Samples]] = {"outputs": OutputSamples, "uses": UseSamples}


def held_gradients(
    source: Source, examples: Examples, outputs: Outputs, draws: Draws, order: torch.Generator
) -> HeldBatches:
    """Batches from Jacobians that are formed once: a gradient is linear in the cotangent, g = Jᵀc.

    A fixed reference needs less, since the gradients themselves never change.
    """
    shapes, (e, p, _), fixed = source.target.shapes, outputs.shape, draws.reference.fixed
    c, pieces = draws.again((e, p), 1, order) if fixed else EachOutput(), []
    for start in range(0, e, FORMED):
        few = slice(start, start + FORMED)
        pieces.append(source([tensor[few] for tensor in examples], c[few]).flat())
    jacobian = usable(torch.cat(pieces).view(e * p, -1, pieces[0].shape[-1]), ZERO)
    f = torch.empty(0) if fixed else outputs.all().flatten(0, 1)

    def some(index: Int[Tensor, " n"], generator: torch.Generator) -> Gradients:
        g, size = jacobian.index_select(0, index.to(jacobian.device)), len(index) * parallel.processes()
        if not fixed:
            c = draws.again((size, 1), 1, generator)[parallel.share(size)](f[index].unsqueeze(1))
            g = torch.bmm(c[:, 0], g)
        return Gradients(shapes, [Formed(shapes, g[:, 0])])

    return HeldBatches(e * p, some, order)


def pieces(target: Target, inputs: Inputs, draws: int = 0) -> Iterator[Examples]:
    """The examples of a reading, ``CHUNK`` at a time, or up to eight times as many of them where gradients are small.

    ``draws`` is the number of cotangents of an output, as many as outputs if it is 0. References are drawn in order, so
    that no number depends on this but by rounding.
    """
    if kind(inputs) != "tensors":
        return chunks(inputs, CHUNK)
    p, k = target.outputs(first(inputs, 1)).shape[1:]
    return chunks(inputs, CHUNK * min(8, max(1, LITTLE // (CHUNK * p * (draws or k) * (k + target.size)))))
