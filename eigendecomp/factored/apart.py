"""Output gradients of all uses, with layers that keep positions apart differentiated for all positions at once.

Where outputs have positions, each position is a sample and needs a backward pass of its own; but not through the last
layers, which commonly keep positions apart. The uses in such layers, and the first operation behind which all layers
are such, are found once; every batch is looked at again.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigendecomp.factored.layouts import Layout, NotUnderstood
from eigendecomp.factored.operations import Node, Plan, Use
from eigendecomp.factored.record import Recorder, Trace


class PositionsMeet(Exception):
    """Positions meet in layers that seemed to keep them apart."""


def find_apart(
    recorder: Recorder, traces: Sequence[Trace], plans: Sequence[Plan], c: Float[Tensor, "e p k"]
) -> int | None:
    """Set ``apart`` of those plans whose use has outputs that depend on their own position alone.

    Returns the number of the operation from which on outputs depend on their own position alone, if there is one.
    Cotangents at half of the samples must send nothing to the other half. Any two samples are told apart by one of the
    halves; as a gradient may also vanish by chance, later calls look again.
    """
    e, p = c.shape[:2]
    if p == 1:
        return None
    layout, trace = Layout(positions=p), traces[0]
    first = [*trace.uses, *trace.kept.values()]
    good = {i for i, node in enumerate(first) if node.edge and layout.fits(node.by_sample(node.output).shape, e)}
    seen: set[int] = set()
    for run in traces:
        nodes = [*run.uses, *run.kept.values()]
        for half in halves(c):
            left = [i for i in sorted(good) if nodes[i].edge]
            pulled = recorder.pull(run.output, [nodes[i] for i in left], (c * half[..., None]).unsqueeze(0))
            for i, delta in zip(left, pulled, strict=True):
                by_sample = layout.split(nodes[i].by_sample(delta[0]), e)
                if by_sample[half.flatten()].any():
                    seen.add(i)
                if by_sample[~half.flatten()].any():
                    good.remove(i)
    good &= seen
    for i, (use, plan) in enumerate(zip(trace.uses, plans, strict=True)):
        if i in good:
            with suppress(NotUnderstood):
                plan.apart = Plan.of(use, layout, e, plan.shape, plan.growing)
    mixing = [use for use, plan in zip(trace.uses, plans, strict=True) if plan.apart is None]
    kept = zip(trace.kept.items(), range(len(trace.uses), len(first)))
    return next((number for (number, node), i in kept if i in good and all_through(trace.output, node, mixing)), None)


def halves(c: Float[Tensor, "e p k"]) -> Iterator[Bool[Tensor, "e p"]]:
    """Masks of the samples whose index has a bit set, and of the others, for every bit."""
    index = torch.arange(c.shape[0] * c.shape[1], device=c.device).view(c.shape[:2])
    for bit in range((index.numel() - 1).bit_length()):
        half = (index >> bit) % 2 == 1
        yield from (half, ~half)


def all_through(output: Node, node: Node, others: Sequence[Node]) -> bool:
    """Whether the output depends on the other nodes only through ``node``."""
    ends, seen, ahead = {other.edge.node for other in others}, {node.edge.node}, [output.edge.node]
    while ahead:
        here = ahead.pop()
        if here is None or here in seen:
            continue
        if here in ends:
            return False
        seen.add(here)
        ahead += [following for following, _ in here.next_functions]
    return True


def output_gradients(
    recorder: Recorder,
    trace: Trace,
    plans: Sequence[Plan],
    boundary: Node | None,
    c: Float[Tensor, "e p r k"],
    first: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Output gradients of every use: (r, …) where positions are apart, where they are not (positions · r, …).

    Args:
        boundary: a node from which on outputs depend on their own position alone.
        first: the position from which on backward passes are run where positions are not apart.

    Raises:
        PositionsMeet: if in this batch a gradient goes from one position to another where none should.
    """
    apart = [use for use, plan in zip(trace.uses, plans, strict=True) if plan.apart is not None]
    mixing = [use for use, plan in zip(trace.uses, plans, strict=True) if plan.apart is None]
    boundary = boundary if mixing else None
    ends = [*apart, *([] if boundary is None else [boundary])]
    deltas = of_all_positions(recorder, trace.output, ends, c, generator) if ends else []
    start, own = trace.output, c
    if boundary is not None:
        own = Layout(positions=c.shape[1]).split(boundary.by_sample(deltas.pop()), c.shape[0], 1)
        start, own = boundary, own.unflatten(1, c.shape[:2]).movedim(0, 2).flatten(3)
    pulled = each_position(recorder, start, mixing, own, first)
    by_use = dict(zip((*apart, *mixing), (*deltas, *pulled), strict=True))
    return [by_use[use] for use in trace.uses]


def each_position(
    recorder: Recorder, start: Node, uses: Sequence[Use], own: Float[Tensor, "e p r k"], first: int
) -> list[Float[Tensor, "mr *shape"]]:
    """What goes back to uses from each of the positions from ``first`` on alone; ``own`` is a node's cotangent."""
    e, p, r, k = own.shape
    if not uses:
        return []
    each, index = own.new_zeros(p - first, r, e, p, k), torch.arange(p - first, device=own.device)
    each[index, :, :, first + index] = own[:, first:].movedim(0, 2)
    return recorder.pull(start, uses, each.view(-1, *start.output.shape), e * p)


def of_all_positions(
    recorder: Recorder, output: Node, ends: Sequence[Node], c: Float[Tensor, "e p r k"], generator: torch.Generator
) -> list[Tensor]:
    """Output gradients of nodes where positions are apart, from two backward passes.

    Each pass is for a random half of the positions, to see that the others get nothing. A pair that meets is split
    with probability ½, and leaks rarely come as a single pair, so one is soon noticed.
    """
    e, p = c.shape[:2]
    layout = Layout(positions=p)
    first = torch.randint(2, (e, p), generator=generator).bool().to(c.device)
    halves = first, ~first
    one, other = (recorder.pull(output, ends, (c * half[..., None, None]).movedim(2, 0), e * p) for half in halves)
    by_place = {node.place: (node, *pair) for node, *pair in zip(ends, one, other, strict=True)}
    met = [
        layout.split(node.by_sample(delta), e, 1).flatten(2).any(2) & ~half.flatten()
        for node, *pair in by_place.values()
        for delta, half in zip(pair, halves)
    ]
    if torch.cat(met).any():  # looked at once, since a GPU waits at every look
        raise PositionsMeet
    del one, other  # so that each is free again once it is added
    places = list(by_place)
    added = {place: torch.add(*by_place.pop(place)[1:]) for place in places}
    return [added[node.place] for node in ends]
