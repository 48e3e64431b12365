"""Samples at early positions captured on prefixes of the sequence, for models that are found to be causal.

What a causal model gives for a position depends on nothing behind it, so backward passes from early positions need only
a run on a prefix, and the factors of their gradients are as long as the prefix. That a model is causal is found on a
few examples; whenever a prefix is run, its outputs must be those of the whole sequence.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigendecomp.factored.discover import Reading
from eigendecomp.factored.guard import exactness
from eigendecomp.factored.layouts import Layout
from eigendecomp.factored.operations import Plan
from eigendecomp.factored.record import FEW_SAMPLES, Trace
from eigendecomp.gradients import Gradients

if TYPE_CHECKING:
    from eigendecomp.factored.source import Capture

OPS_PER_NUMBER = 400  # operations that a pass takes for every number that is kept for it: measured on transformers
LAUNCH = 10**6  # operations that take as long as starting one function of torch
RECORDED = 12  # how much longer that takes where it is recorded
GROUPS = (1, 2, 3, 4, 6, 8)  # of positions, to choose from; more save little
GAIN = 1.1  # how many times faster prefixes must be by the count
LEAST = 4  # positions of a group, of which fewer are not worth a run


class NotCausal(Exception):
    """A prefix gives other outputs than the whole sequence."""


class Prefixes:
    """Captures samples at early positions of a causal model on runs of prefixes.

    Args:
        whole: captures whole sequences.
        sequential: of every input, whether it has the positions along its second axis.
    """

    def __init__(self, whole: "Capture", sequential: Sequence[bool]) -> None:
        self.whole, self.sequential = whole, sequential
        self.readings: dict[int, Reading] = {}  # by the length of a prefix

    @classmethod
    def find(cls, whole: "Capture", examples: Sequence[Tensor]) -> Self | None:
        """What captures prefixes of a model that gives for them what it gives for these whole examples; else None."""
        p, plans = whole.outputs[0], whole.reading.plans
        prefixes = cls(whole, [x.ndim > 1 and x.shape[1] == p for x in examples])
        if p < 2 * LEAST or not any(prefixes.sequential) or all(plan.apart is not None for plan in plans):
            return None
        f = whole.run(examples)[1]
        try:
            _, trace, _ = prefixes.run(examples, p // 2)
        except NotCausal:
            return None
        return prefixes if bool(alike(trace, f)) else None

    def ends(self, e: int, draws: int) -> list[int]:
        """Where the samples of a piece end and those of the next one begin, so that e examples take least work."""
        p = self.whole.outputs[0]
        choices = [[p * i // count for i in range(1, count)] for count in GROUPS if count <= max(1, p // LEAST)]
        costs = [self.cost([*ends, p], max(2, e), draws) * (GAIN if ends else 1) for ends in choices]
        return choices[costs.index(min(costs))]

    def cost(self, lengths: Sequence[int], e: int, draws: int) -> float:
        """Operations that capturing pieces of these lengths takes, starting functions of torch included."""
        reading, total = self.whole.reading, 0.0
        each = OPS_PER_NUMBER * reading.bytes_per_example / reading.bytes_per_number / lengths[-1]
        for first, q in zip([0, *lengths], lengths):
            passes = (q - first) * draws
            total += LAUNCH * len(reading.operations) * (RECORDED + (1 if e * q <= FEW_SAMPLES else passes))
            total += each * e * q * (1 + passes)
        return total

    def run(self, examples: Sequence[Tensor], q: int) -> tuple[Reading, Trace, list[Tensor]]:
        """How uses are read in the first q positions, a recorded run of these, and its inputs.

        Raises:
            NotCausal: if other operations are run than for the whole sequence.
        """
        some = [x[:, :q].contiguous() if along else x for x, along in zip(examples, self.sequential, strict=True)]
        try:
            trace = self.whole.run(some)[0]
            if q not in self.readings:
                self.readings[q] = shorter(self.whole.reading, trace, q)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model says of inputs that are too short for it
            raise NotCausal from error
        if not self.readings[q].recognises(trace):
            raise NotCausal
        return self.readings[q], trace, some

    def gradients(
        self, examples: Sequence[Tensor], f: Float[Tensor, "e p k"], c: Float[Tensor, "e p r k"], ends: Sequence[int]
    ) -> list[Gradients]:
        """The gradients of the samples that end at each of these positions.

        Raises:
            NotCausal: if a prefix gives other outputs than the whole sequence.
        """
        pieces, same = [], []
        for first, q in zip([0, *ends], ends):
            reading, trace, some = self.run(examples, q)
            same.append(alike(trace, f))
            pieces.append(self.whole.piece(reading, trace, some, c[:, :q], first))
        if not bool(torch.stack(same).all()):  # looked at once, since a GPU waits at every look
            raise NotCausal
        return pieces


def shorter(reading: Reading, trace: Trace, q: int) -> Reading:
    """How uses are read in a run of a prefix, in which samples lie as in the whole sequence.

    Raises:
        NotCausal: if the run differs in more than its length. Other errors where a use cannot be read so.
    """
    e, _, k = trace.output.output.shape
    if trace.operations != reading.operations or trace.output.output.shape[1] != q:
        raise NotCausal
    plans = []
    for use, plan in zip(trace.uses, reading.plans, strict=True):
        shape = tuple(trace.derived[use.name][0].output.shape) if use.name in trace.derived else plan.shape
        plans.append(Plan.of(use, plan.layout, e, shape, plan.growing))
        if plan.apart is not None:
            plans[-1].apart = Plan.of(use, Layout(positions=q), e, shape, plan.growing)
    return replace(reading, outputs=(q, k), plans=plans)


def alike(trace: Trace, f: Float[Tensor, "e p k"]) -> Bool[Tensor, ""]:
    """Whether the outputs of examples on a prefix are those on the whole sequence."""
    own = trace.output.output.detach()[: len(f)]
    f = f[:, : own.shape[1]]
    return (own - f).abs().amax() <= exactness(f.dtype) / 10 * f.abs().amax()
