"""How every use of every parameter is read, found once on a few examples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.factored.apart import find_apart
from eigendecomp.factored.layouts import Layout, NotUnderstood
from eigendecomp.factored.local import Local
from eigendecomp.factored.operations import Plan, Use
from eigendecomp.factored.record import Recorder, Trace
from eigendecomp.support.rows import PIECE

DIFFERENT = (
    "the model runs different operations for different inputs, so its gradients cannot be captured; give a model "
    "without data-dependent branches or loops over examples"
)

MOST_RUNS = 6  # of the first examples with other noise, until it is clear where samples lie


@dataclass
class Reading:
    """What is the same in every batch of examples of one shape."""

    shapes: Mapping[str, tuple[int, ...]]  # of the parameters
    examples: list[torch.Size]  # shapes of an example's inputs
    outputs: tuple[int, int]  # positions and outputs of an example
    operations: list[Any]  # in order
    bytes_per_example: float  # of activations
    bytes_per_number: int
    plans: list[Plan] = field(default_factory=list)  # of every use, in order
    boundary: int | None = None  # the operation from which on outputs depend on their own position alone
    fallback: dict[str, str] = field(default_factory=dict)  # parameters left to the oracle, and why
    derived: dict[str, tuple[str, ...]] = field(default_factory=dict)  # outputs read as parameters, made of these

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Leave parameters to the oracle, and do not look at their uses any more."""
        reasons = {**reasons, **self.fallback}
        for _ in self.derived:  # what is made of several goes with any of them
            for roots in self.derived.values():
                reasons = {root: reasons[name] for name in roots if name in reasons for root in roots} | reasons
        self.fallback = {name: reasons[name] for name in self.shapes if name in reasons}
        self.plans = [plan for plan in self.plans if not self.left(plan.name)]

    def roots(self, name: str) -> tuple[str, ...]:
        """The parameters that a parameter or a derived one is made of."""
        return self.derived.get(name, (name,))

    def left(self, name: str) -> bool:
        """Whether a parameter or a derived one is left to the oracle."""
        return self.roots(name)[0] in self.fallback

    def recognises(self, trace: Trace) -> bool:
        """Whether every use in a run is the one that a plan was made for."""
        examples = len(trace.output.output)
        return len(trace.uses) == len(self.plans) and all(
            plan.recognises(use, examples) for use, plan in zip(trace.uses, self.plans, strict=True)
        )

    @property
    def bytes_per_draw(self) -> float:
        """Bytes that an example's cotangents, its factors and their products take, for every draw."""
        own = [*self.fallback, *(root for roots in self.derived.values() for root in roots)]
        formed = sum(self.outputs[0] * math.prod(self.shapes[name]) for name in own)
        cotangents = math.prod(self.outputs)
        return 2 * self.bytes_per_number * (cotangents + formed + sum(plan.numbers for plan in self.plans))


def discover(recorder: Recorder, examples: Sequence[Tensor], terms: int) -> tuple[Reading, Float[Tensor, "e p k"]]:
    """How uses are read, and the cotangents of the examples with which that was found.

    Args:
        terms: directions × rank, from which memory is estimated.

    Raises:
        ValueError: if the output does not depend on the chosen parameters.
    """
    shared, generator = recorder.look_again(), torch.Generator().manual_seed(0)
    traces = [recorder.run(examples, None), recorder.run(examples, None, generator)]
    trace, f = traces[0], traces[0].output.output
    if not f.requires_grad:
        names = recorder.target.names
        raise ValueError(f"the output does not depend on the chosen parameters {names}: is it detached on the way?")
    fewer = recorder.run([tensor[1:] for tensor in examples])
    c = torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)
    reading = Reading(
        recorder.target.shapes, [x.shape[1:] for x in examples], (f.shape[1], f.shape[2]), trace.operations,
        activations(recorder, trace), f.element_size(), fallback=shared,
    )  # fmt: skip
    if fewer.signature != trace.signature:
        reading.leave(dict.fromkeys(recorder.target.names, DIFFERENT))
    else:
        traces = [run for run in traces if run.signature == trace.signature]
        constant = set(recorder.constant)
        reading.plans, reasons, sure = plans_of(recorder, traces, fewer, c)
        while not sure and len(traces) < MOST_RUNS:  # other noise may bring life to what is dead
            again = recorder.run(examples, None, generator)
            if again.signature != trace.signature:
                break
            traces.append(again)
            reading.plans, reasons, sure = plans_of(recorder, traces, fewer, c)
        if recorder.constant != constant:  # what all examples share, as a table's rows for positions, is a weight
            return discover(recorder, examples, terms)
        reading.derived = {name: roots for name, (_, roots) in trace.derived.items()}
        reading.leave(reasons)
        for run in traces:
            run.uses = [use for use in run.uses if not reading.left(use.name)]
        reading.boundary = find_apart(recorder, traces, reading.plans, c)
        for use, plan in zip(trace.uses, reading.plans, strict=True):
            plan.numbers = numbers(use, plan, f.shape[0], f.shape[1], terms)
    return reading, c


def plans_of(
    recorder: Recorder, traces: Sequence[Trace], fewer: Trace, c: Float[Tensor, "e p k"]
) -> tuple[list[Plan], dict[str, str], bool]:
    """A plan for every use that is understood, for the other parameters why theirs are not, and whether one is sure.

    Args:
        traces: runs of the same examples.
        fewer: a run of all examples but one.
    """
    deltas = [[d.nan_to_num() for d in pull_alone(recorder, run, c)] for run in traces]
    plans, reasons, trace, sure = [], dict(traces[0].unknown), traces[0], True
    for use, other, *delta in zip(trace.uses, fewer.uses, *deltas, strict=True):
        derived = trace.derived.get(use.name)
        shape = recorder.target.shapes[use.name] if derived is None else tuple(derived[0].output.shape)
        try:
            if torch.equal(use.output, other.output) and use.occurrence not in recorder.constant:
                recorder.constant.add(use.occurrence)
                continue
            layout, *more = find_layouts(use, other, delta)
            sure = sure and not more
            plans.append(Plan.of(use, layout, len(c), shape, use.growing_axes(other, len(c))))
        except NotUnderstood as reason:
            reasons = dict.fromkeys(trace.roots(use.name), str(reason)) | reasons
    return plans, reasons, sure


def pull_alone(recorder: Recorder, run: Trace, c: Float[Tensor, "e p k"]) -> list[Float[Tensor, "e *shape"]]:
    """What each example's cotangent alone sends back to all uses; of a large vocabulary, one after the other."""
    own = torch.eye(len(c), dtype=c.dtype, device=c.device)[:, :, None, None]
    if c.numel() <= PIECE:
        return recorder.pull(run.output, run.uses, own * c)
    return [torch.cat(each) for each in zip(*(recorder.pull(run.output, run.uses, (one * c)[None]) for one in own))]


def find_layouts(use: Use, fewer: Use, deltas: Sequence[Float[Tensor, "e *shape"]]) -> list[Layout]:
    """Where samples may lie in the output of a use: several places only where some examples send nothing back.

    Args:
        fewer: the same use in a run of all examples but one.
        deltas: what each example sends back alone, in one run or several: zero wherever another example lies.

    Raises:
        NotUnderstood: if samples do not lie along one axis.
    """
    count, less = len(deltas[0]), fewer.by_sample(fewer.output).shape
    shape = use.by_sample(use.output).shape
    own, layouts = torch.eye(count, dtype=torch.bool, device=deltas[0].device), []
    for axis in range(1 if use.first_axis_alone else len(shape)):
        smaller = [*shape[:axis], shape[axis] // count * (count - 1), *shape[axis + 1 :]]
        if shape[axis] % count == 0 and smaller == list(less):
            for layout in (Layout(axis, True), Layout(axis, False))[: shape[axis] // count]:
                if not any(layout.split(use.by_sample(delta), count, 1)[~own].any() for delta in deltas):
                    layouts.append(layout)
    if not layouts:
        raise NotUnderstood("samples do not lie along one axis")
    return layouts


def activations(recorder: Recorder, trace: Trace) -> float:
    """Bytes that an example's activations take which a backward pass needs: those in the graph, and inputs of uses."""
    weights = (*recorder.target.chosen.values(), *recorder.target.frozen.values())
    held = {weight.untyped_storage().data_ptr() for weight in weights}
    needed = [*(node.output for node in trace.kept.values() if node.edge), *(use.data for use in trace.uses)]
    memory = {m.data_ptr(): m.nbytes() for m in (tensor.untyped_storage() for tensor in needed)}
    return sum(size for at, size in memory.items() if at not in held) / len(trace.output.output)


def numbers(use: Use, plan: Plan, examples: int, positions: int, terms: int) -> float:
    """How many numbers the gradients of one use take for each example and draw, with their products."""
    delta, samples = use.by_sample(use.output), positions if plan.apart is None else 1
    factors = samples * delta.numel() // examples
    if not plan.axes.left:
        return factors + (positions * math.prod(plan.shape) if plan.kind is Local else 0)
    return factors + min(2 * terms * factors // delta.shape[-1], positions * math.prod(plan.shape))
