"""Cotangents of early positions on prefixes of the sequence, for models that are found to be causal.

What a causal model gives for a position depends on nothing behind it, so backward passes from early positions need only
a run on a prefix. That a model is causal is found on a few examples, with the places of positions in the outputs of
uses; whenever a prefix is run, its outputs must be those of the whole sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eigendecomp.factored.apart import each_position, placed
from eigendecomp.factored.discover import Reading
from eigendecomp.factored.guard import exactness
from eigendecomp.factored.operations import Node, Plan, Use
from eigendecomp.factored.record import FEW_SAMPLES, Recorder, Trace

OPS_PER_NUMBER = 100  # operations that take as long as writing one number
LAUNCH = 10**6  # operations that take as long as starting one function of torch
RECORDED = 2  # how much longer starting it takes where it is recorded, or batched over cotangents
GROUPS = (2, 3, 4, 6, 8)  # prefixes to choose from; more save little
GAIN = 1.1  # how many times faster prefixes must be by the count
LEAST = 4  # positions of which fewer are not worth the search


class NotCausal(Exception):
    """A prefix gives other outputs than the whole sequence."""


class Work(TorchDispatchMode):
    """Counts what is done inside."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # which imports Triton, and few models need it

        super().__init__()
        self.calls, self.operations, self.registry = 0, 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if func._overloadpacket in self.registry:
            self.operations += self.registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        if not func.is_view:
            self.operations += OPS_PER_NUMBER * sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


@dataclass(frozen=True)
class Place:
    """Where positions lie in the output of a use, or its gradients, once examples are split off.

    Args:
        axis: the axis that holds them, behind that of the examples.
        outer: what lies along it outside of the positions.
    """

    axis: int
    outer: int

    @classmethod
    def find(
        cls, plan: Plan, uses: tuple[Use, Use], deltas: tuple[Tensor, Tensor], positions: tuple[int, int], e: int
    ) -> Self | None:
        """The one place where the output gradients of a sequence, (1, …), are those of its prefix and zero behind.

        Args:
            uses: the use in a run of the sequence and in one of its prefix.
            positions: of the sequence and of its prefix.
        """
        (p, q), (whole, short) = positions, (by_example(use, plan, d, e) for use, d in zip(uses, deltas, strict=True))
        if whole.ndim != short.ndim or whole.untyped_storage().data_ptr() != deltas[0].untyped_storage().data_ptr():
            return None
        (axis, *others), found = [a for a in range(whole.ndim) if whole.shape[a] != short.shape[a]] or [0], []
        if others or axis < 2 or whole.shape[axis] % p or whole.shape[axis] // p * q != short.shape[axis]:
            return None
        each = whole.shape[axis] // p
        for place in (cls(axis, outer) for outer in range(1, each + 1) if each % outer == 0):
            embedded = torch.zeros_like(whole)
            place.of(embedded, p, q).copy_(place.of(short, q, q))
            if (embedded - whole).norm() <= tolerance(whole) * whole.norm():
                found.append(place)
        return found[0] if len(found) == 1 else None

    def of(self, x: Float[Tensor, "c e ..."], p: int, q: int) -> Tensor:
        """The first q of p positions."""
        return x.unflatten(self.axis, (self.outer, p, -1)).narrow(self.axis + 1, 0, q)


@dataclass
class Prefixes:
    """Backward passes from early positions of a causal model, on runs of prefixes."""

    recorder: Recorder
    reading: Reading
    cut: list[bool]  # of every input, whether it has the positions along its second axis
    examples: int  # in which the work was counted
    forward: Work
    backward: Work  # from one cotangent
    places: dict[Plan, Place]

    @classmethod
    def find(cls, recorder: Recorder, reading: Reading, examples: Sequence[Tensor]) -> Self | None:
        """What is known of a model that gives on prefixes of these examples what it gives on the whole; else None."""
        p, e = reading.outputs[0], len(examples[0])
        cut, q = [x.ndim > 1 and x.shape[1] == p for x in examples], p // 2
        if p < LEAST or not any(cut) or all(plan.apart is not None for plan in reading.plans):
            return None
        found = cls(recorder, reading, cut, e, Work(), Work(), {})
        with found.forward:
            trace = recorder.run(examples, found.kept)
        if trace.operations != reading.operations or not reading.recognises(trace, e):
            return None
        try:
            part = found.run(trace, examples, q)
        except NotCausal:
            return None
        if not bool(alike(part, trace, e)):
            return None
        start, begin = (found.start(run) for run in (trace, part))
        early = torch.randn(begin.output.shape, generator=torch.Generator().manual_seed(0)).to(begin.output)
        c = torch.cat([early.reshape(e, q, -1), early.new_zeros(e, p - q, early.numel() // (e * q))], 1)
        mixing = [number for number, plan in enumerate(reading.plans) if plan.apart is None]
        uses, short_uses = ([run.uses[number] for number in mixing] for run in (trace, part))
        with found.backward:
            whole = recorder.pull(start, uses, c.reshape(1, *start.output.shape))
        short = recorder.pull(begin, short_uses, early.unsqueeze(0))
        for number, use, short_use, *deltas in zip(mixing, uses, short_uses, whole, short, strict=True):
            plan, both = reading.plans[number], (deltas[0], deltas[1])
            if (place := Place.find(plan, (use, short_use), both, (p, q), e)) is None:
                return None
            found.places[plan] = place
        return found

    @property
    def kept(self) -> tuple[int, ...]:
        """The operation that is kept in every run."""
        return () if self.reading.boundary is None else (self.reading.boundary,)

    def start(self, trace: Trace) -> Node:
        """The node from which on positions are apart, or the output."""
        return trace.output if self.reading.boundary is None else trace.kept[self.reading.boundary]

    def run(self, trace: Trace, examples: Sequence[Tensor], q: int) -> Trace:
        """A recorded run of the first q positions; raises :class:`NotCausal` if it is another than of all."""
        try:
            some = [x[:, :q].contiguous() if cut else x for x, cut in zip(examples, self.cut)]
            part = self.recorder.run(some, self.kept)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model says of inputs that are too short for it
            raise NotCausal from error
        same = part.operations == trace.operations and part.signature == trace.signature
        if not same or part.output.output.shape[1] != q:
            raise NotCausal
        return part

    def pull(
        self,
        trace: Trace,
        examples: Sequence[Tensor],
        count: int,
        start: Node,
        uses: Sequence[Use],
        own: Float[Tensor, "e p r k"],
    ) -> list[Float[Tensor, "pr *shape"]]:
        """As :func:`eigendecomp.factored.apart.each_position`, for a run of these examples, of which ``count`` matter.

        Raises:
            NotCausal: if a prefix gives other outputs than the whole sequence.
        """
        e, p, r = own.shape[:3]
        ends = self.ends(e, r)
        if not uses or len(ends) == 1 or trace.operations != self.reading.operations:
            return each_position(self.recorder, start, uses, own)
        plans = [plan for plan in self.reading.plans if plan.apart is None]
        found = {use.place: use.output.new_zeros(p * r, *use.output.shape) for use in uses}
        same: list[Tensor] = []
        for first, q in zip([0, *ends], ends):
            part = trace if q == p else self.run(trace, examples, q)
            short = [use for use, plan in zip(part.uses, self.reading.plans, strict=True) if plan.apart is None]
            begin = self.start(part)
            each = placed(own[:, first:q], first, q).reshape(-1, *begin.output.shape)
            same.append(alike(part, trace, count))
            size = len(each) if e * q <= FEW_SAMPLES else 1  # one by one, so that they are not held twice
            for at, c in zip(range(first * r, q * r, size), each.split(size)):
                deltas = self.recorder.pull(begin, short, c, e * q)
                for use, mine, plan, delta in zip(uses, short, plans, deltas, strict=True):
                    place, rows = self.places[plan], found[use.place][at : at + size]
                    own_rows = place.of(by_example(mine, plan, delta, e), q, q)
                    place.of(by_example(use, plan, rows, e), p, q).copy_(own_rows)
        if not bool(torch.stack(same).all()):
            raise NotCausal
        return [found[use.place] for use in uses]

    def ends(self, e: int, draws: int) -> list[int]:
        """Where the prefixes for e examples end, the last one at the end of the sequence: what takes least work."""
        p = self.reading.outputs[0]
        # One position alone may run through other operations than several.
        choices = [[p * (i + 1) // count for i in range(count)] for count in (1, *GROUPS) if count <= p // 2]
        costs = [self.cost(ends, e, draws) * (GAIN if len(ends) > 1 else 1) for ends in choices]
        return choices[costs.index(min(costs))]

    def cost(self, ends: Sequence[int], e: int, draws: int) -> float:
        """Operations that capturing with these prefixes takes, starting functions of torch included."""
        total, share = 0.0, e / self.examples / ends[-1]
        for first, q in zip([0, *ends], ends):
            passes = (q - first) * draws
            starts = RECORDED if e * q <= FEW_SAMPLES else passes
            total += LAUNCH * (RECORDED * self.forward.calls + starts * self.backward.calls)
            total += share * q * (self.forward.operations + passes * self.backward.operations)
        return total


def by_example(use: Use, plan: Plan, x: Float[Tensor, "c *shape"], e: int) -> Float[Tensor, "c e ..."]:
    """Output gradients of a use with examples split off."""
    return plan.layout.split(use.by_sample(x), e, 1)


def alike(part: Trace, trace: Trace, count: int) -> Bool[Tensor, ""]:
    """Whether the outputs of the first examples on a prefix are those on the whole sequence."""
    own = part.output.output.detach()[:count]
    f = trace.output.output.detach()[:count, : own.shape[1]]
    return (own - f).abs().amax() <= tolerance(f) * f.abs().amax()


def tolerance(x: Tensor) -> float:
    """A relative difference that rounding may make."""
    return exactness(x.dtype) / 10
