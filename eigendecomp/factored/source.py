"""Per-sample gradients from one ordinary forward pass and the backward passes of the samples' cotangents.

Every use of a chosen parameter is recorded in the forward pass (:mod:`eigendecomp.factored.record`). Backward passes to
the outputs of these uses give their output gradients. A use's input and output gradient are the parameter's gradient in
factored form (:mod:`eigendecomp.factored.terms`). How a use is read (:mod:`eigendecomp.factored.rules`) is found once
on a few examples, and checked there against one example run alone. A parameter with a use that is not understood falls
back to :class:`FunctionalSource`, said once.

Where outputs have positions, each position is a sample and needs a backward pass of its own; but not through the last
layers, which commonly keep positions apart and are then differentiated for all positions at once.
"""

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eigendecomp.factored.guard import Guard, Mistaken, coarse, differing
from eigendecomp.factored.pieces import Recomputed
from eigendecomp.factored.record import Node, Trace, Use, storages
from eigendecomp.factored.rules import Layout, NotUnderstood, Plan, find_layout, make_plan, product_sides, summed
from eigendecomp.factored.terms import Factored, Side, Term
from eigendecomp.gradients import Cotangents, Formed, FunctionalSource, Gradients, Part, sum_of
from eigendecomp.gradients import at_own_position as spread
from eigendecomp.target import Target

log = logging.getLogger(__name__)

FEW_ROWS = 128  # up to so many rows of output, one backward pass for all cotangents beats one for each
DIFFERENT = (
    "the model runs different operations for different inputs, so its gradients cannot be captured; give a model "
    "without data-dependent branches or loops over examples"
)
UNTRUE = "its factored gradient is not the true one"


@dataclass(frozen=True)
class Axes:
    """The axes of a parameter that one of its uses splits in two: those of one side, and which side that is."""

    left: tuple[int, ...]  # the other side covers the rest
    input_is_left: bool


class CapturedSource:
    """Factored gradients from one forward pass and the backward passes of the cotangents.

    Args:
        examples: a few examples, on which layouts are found and gradients are checked.
        terms: directions × rank, from which the memory that examples take is estimated.
        budget: bytes that the gradients of one chunk of examples may take; those of a larger batch are captured chunk
            by chunk, and again in the backward pass.
        form: whether gradients may be held as numbers where that is cheaper; without, positions can be told apart.

    Raises:
        ValueError: if what the model gives for one example depends on the examples beside it, or on chance.
    """

    def __init__(
        self, target: Target, examples: Sequence[Tensor], *, terms: int = 64, budget: int = 1 << 29, form: bool = True
    ) -> None:
        self.target, self.terms, self.budget, self.form = target, terms, budget, form
        self.plans: list[Plan] = []  # how every use is read
        self.apart: list[Plan | None] = []  # the same, where positions are apart
        self.cut: int | None = None  # the operation from which on they are
        self.fallback: dict[str, str] = {}  # parameters left to the oracle, and why
        self.constant: set[int] = set()  # numbers of the lookups whose rows all examples share
        self.batched = True  # whether torch can batch the model's backward pass
        self.coins = torch.Generator().manual_seed(0)
        self.guard = Guard(target)
        self._prepare(several(examples, 3))

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients:
        """The gradients of the examples' samples, in factored form where that is cheaper.

        Raises:
            Mistaken: if a look at this call finds that those of earlier calls may have been wrong.
            ValueError: if autograd's own gradient of an example changes with the examples beside it.
        """
        self.prepare(examples)
        pieces = self._pieces(examples, cotangents)
        gradients, was_wrong = self._captured(pieces), False
        if self.guard.due():
            while wrong := self.guard.wrong(pieces, gradients):
                was_wrong = True
                self._distrust(wrong)
                gradients = self._captured(pieces)
        if was_wrong and self.guard.calls > 1:
            raise Mistaken
        return gradients

    def _pieces(self, examples: Sequence[Tensor], cotangents: Cotangents) -> list[tuple[list[Tensor], Cotangents]]:
        """The examples in parts whose gradients fit into the budget."""
        e, (p, k) = len(examples[0]), self.outputs
        none = torch.zeros(1, p, k, dtype=self.target.dtype, device=self.target.device)
        draws = cotangents[slice(0, 1)](none).shape[2]
        chunks = math.ceil(e * (self.bytes_per_example + draws * self.bytes_per_draw) / self.budget)
        size = e if e <= 2 else max(2, math.ceil(e / max(1, chunks)))  # one alone would be run twice
        parts = [slice(start, start + size) for start in range(0, e, size)]
        return [([tensor[part] for tensor in examples], cotangents[part]) for part in parts]

    def _captured(self, pieces: Sequence[tuple[Sequence[Tensor], Cotangents]]) -> Gradients:
        if len(pieces) == 1:
            return self.gradients(*pieces[0])
        later = [partial(self.gradients, *piece) for piece in pieces]
        return Gradients(self.target.shapes, [Recomputed(self.target.names, later)])

    def _distrust(self, wrong: Sequence[str]) -> None:
        """Leave parameters to the oracle; where it is itself wrong, to a backward pass for each example."""
        if set(wrong) - set(self.fallback):
            self._fall_back(dict.fromkeys(wrong, UNTRUE))
            self._say(wrong)
        elif not self.slow.loop:
            self.slow.loop = True
        else:
            raise ValueError(
                f"the gradient of {wrong[0]!r} for one example changes with the examples beside it; per-sample "
                "gradients need independent examples along the first axis"
            )

    def _say(self, names: Collection[str]) -> None:
        listed = "; ".join(f"{name} ({self.fallback[name]})" for name in names)
        log.warning("gradients are formed by torch.func.vmap, which is slower, for: %s", listed)

    def prepare(self, examples: Sequence[Tensor]) -> None:
        """Find out again how uses are read, if these examples have other shapes than those seen last."""
        if [tensor.shape[1:] for tensor in examples] != self.shapes:
            self._prepare(several(examples, 3))

    # ---- recording

    def record(
        self, examples: Sequence[Tensor], keep: Collection[int] | None = (), noise: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "e p k"], Trace]:
        """Outputs, and every use of a chosen parameter on the way there; :class:`Trace` explains the options."""
        with torch.enable_grad(), Trace(self.storages, self.constant, keep, noise) as trace:
            f = self.target.call(examples)
        trace.settle()
        trace.uses = [use for use in trace.uses if use.edge is not None]
        return f, trace

    def pull(
        self, node: Node, nodes: Sequence[Node], c: Float[Tensor, "c *out"], rows: int = 0
    ) -> list[Float[Tensor, "c *shape"]]:
        """What several cotangents of one node send back to others; ``rows`` tells how large the batch is."""
        ends = {end.place: end for end in nodes}  # a product and the bias added to it have one output
        if not ends:
            return []
        edges = [end.edge for end in ends.values()]
        back = partial(torch.autograd.grad, [node.edge], edges, retain_graph=True, allow_unused=True)
        found: Sequence[Tensor | None]
        if len(c) == 1:
            found = [None if g is None else g.unsqueeze(0) for g in back([c[0]])]
        elif self.batched and rows <= FEW_ROWS:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch says which operations inside it could not batch
                    found = back([c], is_grads_batched=True)
            except RuntimeError:
                self.batched = False
                return self.pull(node, nodes, c)
        else:
            found = stacks = [end.output.new_empty(len(c), *end.output.shape) for end in ends.values()]
            for i, row in enumerate(c):
                for stack, g in zip(stacks, back([row]), strict=True):
                    stack[i] = 0 if g is None else g
        pulled = {
            place: end.output.new_zeros(len(c), *end.output.shape) if g is None else g
            for (place, end), g in zip(ends.items(), found, strict=True)
        }
        return [pulled[end.place] for end in nodes]

    def _deltas(self, f: Tensor, trace: Trace, c: Float[Tensor, "e p r k"]) -> list[Tensor]:
        """Output gradients of every use: (r, …) where positions are apart, (positions · r, …) where they are not."""
        e, p = f.shape[:2]
        output = Node(f).settle()
        apart = [use for use, plan in zip(trace.uses, self.apart, strict=True) if plan is not None]
        rest = [use for use, plan in zip(trace.uses, self.apart, strict=True) if plan is None]
        cut = trace.kept.get(self.cut) if self.cut is not None and trace.operations == self.operations else None
        tail = [*apart, *([] if cut is None else [cut])]
        if not tail:
            return self.pull(output, rest, spread(c).transpose(0, 1), e * p)
        # All positions in two backward passes: each for a random half of them, to see that the others get nothing.
        # Two that do meet are in different halves every other time, and seldom are there two alone.
        first = torch.randint(2, (e, p), generator=self.coins).bool().to(f.device)
        second = ~first
        layout, found = Layout(positions=p), []
        one, two = (
            self.pull(output, tail, (c * half[..., None, None]).movedim(2, 0), e * p) for half in (first, second)
        )
        for node, a, b in zip(tail, one, two, strict=True):
            rows = [layout.split(node.rows(x), e, 1) for x in (a, b)]
            if rows[0][:, second.flatten()].any() or rows[1][:, first.flatten()].any():
                log.warning("positions meet in layers that seemed to keep them apart; they are captured one by one now")
                self.apart, self.cut = [None] * len(self.plans), None
                return self._deltas(f, trace, c)
            found.append(a + b)
        if cut is not None:
            own = layout.split(found.pop(), e, 1).unflatten(1, (e, p)).movedim(0, 2).flatten(3)
            pulled = self.pull(cut, rest, spread(own).transpose(0, 1).reshape(-1, *cut.output.shape), e * p)
        else:
            pulled = self.pull(output, rest, spread(c).transpose(0, 1), e * p)
        by_use = dict(zip((*apart, *rest), (*found, *pulled), strict=True))
        return [by_use[use] for use in trace.uses]

    def gradients(self, examples: Sequence[Tensor], cotangents: Callable[[Tensor], Tensor]) -> Gradients:
        """The gradients of the examples' samples, all held at once, whatever the budget."""
        count = len(examples[0])
        # A batch of one may run through other operations than one of several.
        keep = () if self.cut is None else (self.cut,)
        f, trace = self.record(several(examples, 2) if count == 1 else examples, keep)
        e, p = f.shape[:2]
        plans, uses = self.plans, trace.uses
        if not self._recognised(trace, e):
            self._fall_back(dict.fromkeys(self.target.names, DIFFERENT))
            self._say(self.target.names)
            return self.gradients(examples, cotangents)
        c = cotangents(f.detach()[:count])
        r, shapes = c.shape[2], self.target.shapes
        deltas = self._deltas(f, trace, c if count == e else torch.cat([c, torch.zeros_like(c)]))
        by_name: dict[str, list[int]] = defaultdict(list)
        for number, plan in enumerate(plans):
            by_name[plan.name].append(number)
        parts: list[Part] = []
        formed: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            if name in by_name:
                found = [(uses[i], plans[i], self.apart[i], deltas[i]) for i in by_name[name]]
                part = self._read(name, found, e, count, p, r)
            elif name not in self.fallback:  # never used
                part = Factored.zero(name, shape, c.new_zeros(p * r, count, 0))
            else:
                continue
            if isinstance(part, Tensor):
                formed[name] = part
            else:
                parts.append(part)
        if self.fallback:
            values = self.slow.pull_back(examples, spread(c))
            formed.update(zip(self.fallback, values.split([math.prod(shapes[name]) for name in self.fallback], 1)))
        if formed:
            chosen = {name: shapes[name] for name in shapes if name in formed}
            parts.append(Formed(chosen, torch.cat([formed[name] for name in chosen], 1)))
        return Gradients(shapes, parts)

    def _recognised(self, trace: Trace, e: int) -> bool:
        """Whether every use in a run of e examples is the one that a plan was made for."""
        return len(trace.uses) == len(self.plans) and all(
            plan.recognises(use, e) for use, plan in zip(trace.uses, self.plans, strict=True)
        )

    def _read(
        self, name: str, found: Sequence[tuple[Use, Plan, Plan | None, Tensor]], e: int, count: int, p: int, r: int
    ) -> Part | Float[Tensor, "n w"]:
        """The gradients of one parameter for the first ``count`` of e examples, from its uses: factored, or numbers."""
        shape, sums = self.target.shapes[name], []
        terms: dict[tuple, list[Term]] = defaultdict(list)
        both = any(apart is None for _, _, apart, _ in found)
        for use, plan, apart, delta in found:
            if delta.dtype != self.target.dtype:  # under mixed precision; sums over samples are taken in full
                use, delta = use.to(self.target.dtype), delta.to(self.target.dtype)
            plan, own = (plan, count) if apart is None else (apart, count * p)
            if plan.rows is None:
                value = summed(use, plan, delta, e, math.prod(shape))
                sums.append(value[:, :own].transpose(0, 1).flatten(0, 1))
                continue
            a, b = (side.first(own) for side in product_sides(use, plan, delta, e))
            if apart is not None and both:
                a, b = a.spread(p, r), b.spread(p, r)
            terms[plan.group].append((a, b))
        by_rows: dict[tuple[int, ...], list[Term]] = defaultdict(list)
        for (rows, *_), of_group in terms.items():
            by_rows[rows].append((Side.together([a for a, _ in of_group]), Side.together([b for _, b in of_group])))
        parts = [Factored(name, shape, rows, of_rows) for rows, of_rows in by_rows.items()]
        if len(parts) == 1 and not sums:
            # Formed at rank one means formed at any other rank as well; and factors take more memory.
            if self.form and parts[0].better_formed(self.terms, 1):
                parts[0].form()
            return parts[0]
        # Uses that split the parameter's axes differently, or do not factor, share no factored form.
        return sum_of([*sums, *(part.dense()[name].flatten(1) for part in parts)])

    # ---- once: how every use is read, and whether that is right

    def _prepare(self, examples: tuple[Tensor, ...]) -> None:
        self.shapes, said = [tensor.shape[1:] for tensor in examples], set(self.fallback)
        self.storages, self.fallback = storages(self.target.chosen)
        generator = torch.Generator().manual_seed(0)
        runs = [self.record(examples, None), self.record(examples, None, generator)]
        f, trace = runs[0]
        if not f.requires_grad:
            names = self.target.names
            raise ValueError(f"the output does not depend on the chosen parameters {names}: is it detached on the way?")
        _, fewer = self.record([tensor[1:] for tensor in examples])
        if signature(fewer) != signature(trace):
            return self._leave_all(examples, f, trace, said)
        runs = [run for run in runs if signature(run[1]) == signature(trace)]
        c = torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)
        alone = torch.eye(len(f), dtype=f.dtype, device=f.device)[:, :, None, None] * c
        deltas = [[d.nan_to_num() for d in self.pull(Node(f).settle(), run.uses, alone)] for f, run in runs]
        found: list[tuple[Use, Plan]] = []
        reasons, constant = dict(trace.unknown), set(self.constant)
        for use, other, *delta in zip(trace.uses, fewer.uses, *deltas, strict=True):
            try:
                layout = find_layout(use, other, delta)
                found.append((use, make_plan(use, layout, len(f), self.target.shapes[use.name])))
            except NotUnderstood as reason:
                reasons.setdefault(use.name, str(reason))
                if use.kind == "lookup":
                    self.constant.add(use.options[1])
        if self.constant != constant:  # a table whose rows all examples share, as positions do, is read as a weight
            return self._prepare(examples)
        self.operations, self.outputs = trace.operations, f.shape[1:]
        self.plans, self.apart, self.cut = [plan for _, plan in found], [None] * len(found), None
        self._fall_back(reasons)
        for _, run in runs:
            run.uses = [use for use in run.uses if use.name not in self.fallback]
        self._find_apart(runs, c)
        self._check(examples, f, c)
        self._estimate(f, trace)
        if set(self.fallback) - said:
            self._say(self.fallback)
        return None

    def _leave_all(self, examples: tuple[Tensor, ...], f: Tensor, trace: Trace, said: set[str]) -> None:
        """Leave every parameter to the oracle: the model runs other operations for other examples."""
        self.operations, self.outputs = trace.operations, f.shape[1:]
        self.plans, self.apart, self.cut, trace.uses = [], [], None, []
        self._fall_back(dict.fromkeys(self.target.names, DIFFERENT))
        self._check(examples, f, torch.randn(f.shape, generator=torch.Generator().manual_seed(0)).to(f))
        self._estimate(f, trace)
        if set(self.fallback) - said:
            self._say(self.fallback)

    def _fall_back(self, reasons: Mapping[str, str]) -> None:
        """Leave parameters to the oracle, and do not look at their uses any more."""
        reasons = {**reasons, **self.fallback}
        self.fallback = {name: reasons[name] for name in self.target.names if name in reasons}
        self.slow = FunctionalSource(self.target, list(self.fallback))
        self.storages = {at: storage for at, storage in self.storages.items() if storage.name not in self.fallback}
        kept = [number for number, plan in enumerate(self.plans) if plan.name not in self.fallback]
        self.plans, self.apart = [self.plans[i] for i in kept], [self.apart[i] for i in kept]

    def _find_apart(self, runs: Sequence[tuple[Tensor, Trace]], c: Tensor) -> None:
        """Find the uses, and the first operation, from which on an output depends on its own position alone.

        Cotangents at half of the samples must send nothing to the other half. Two samples differ in some bit of their
        numbers, so that some of the halves tell them apart; as a gradient may also vanish by chance, later calls look
        again.
        """
        e, p = c.shape[:2]
        if p == 1:
            return
        layout = Layout(positions=p)
        f, trace = runs[0]
        nodes = [*trace.uses, *trace.kept.values()]
        good = {i for i, node in enumerate(nodes) if node.edge and layout.fits(node.rows(node.output).shape, e)}
        seen: set[int] = set()
        for output, run in runs:
            nodes = [*run.uses, *run.kept.values()]
            for half in (half for bit in range((e * p - 1).bit_length()) for half in halves(f, bit)):
                left = [i for i in sorted(good) if nodes[i].edge]
                pulled = self.pull(Node(output).settle(), [nodes[i] for i in left], (c * half[..., None]).unsqueeze(0))
                for i, delta in zip(left, pulled, strict=True):
                    rows = layout.split(nodes[i].rows(delta[0]), e)
                    if rows[half.flatten()].any():
                        seen.add(i)
                    if rows[~half.flatten()].any():
                        good.remove(i)
        good &= seen
        for number, use in enumerate(trace.uses):
            if number in good:
                with suppress(NotUnderstood):
                    self.apart[number] = make_plan(use, layout, e, self.target.shapes[use.name])
        rest = [use for use, plan in zip(trace.uses, self.apart, strict=True) if plan is None]
        for i, (number, node) in enumerate(trace.kept.items(), len(trace.uses)):
            if i in good and all_through(f, node, rest):
                self.cut = number
                return

    def _estimate(self, f: Tensor, trace: Trace) -> None:
        """Bytes that an example takes: its activations, and for every draw the factors and their products."""
        e, p = f.shape[:2]
        weights = {w.untyped_storage().data_ptr() for w in (*self.target.chosen.values(), *self.target.frozen.values())}
        memory = [node.output.untyped_storage() for node in trace.kept.values()]
        activations = sum({m.data_ptr(): m.nbytes() for m in memory if m.data_ptr() not in weights}.values())
        numbers = sum(p * math.prod(self.target.shapes[name]) for name in self.fallback)
        uses = [use for use in trace.uses if use.name not in self.fallback]
        for use, plan, apart in zip(uses, self.plans, self.apart, strict=True):
            samples = p if apart is None else 1
            delta = use.rows(use.output)
            numbers += samples * delta.numel() // e
            if plan.rows is not None:
                rows = samples * delta.numel() // delta.shape[-1] // e
                numbers += min(2 * self.terms * rows, p * math.prod(self.target.shapes[use.name]))
        self.bytes_per_example = activations / e
        self.bytes_per_draw = 2 * numbers * f.element_size()

    def _check(self, examples: tuple[Tensor, ...], f: Tensor, c: Tensor) -> None:
        """Compare with one example run alone; what differs falls back, and what differs still is refused."""
        position = f.shape[1] // 2
        truth = self.guard.check_first(examples, c, position)
        while True:
            parts = self.gradients(examples, lambda _: c.unsqueeze(2)).parts
            found = {name: g for part in parts for name, g in part.sample(position).dense().items()}
            if not (wrong := differing(found, truth, max(coarse(f.dtype), self.guard.tolerance))):
                return
            self._distrust(wrong)

    # ---- uses one by one

    def axes(self) -> dict[str, list[Axes]]:
        """The sides of every use of every parameter, in the order of :meth:`factors` and :meth:`inputs`.

        Raises:
            ValueError: if a parameter is not a weight that multiplies, so that its gradient has no two factors.
        """
        found: dict[str, list[Axes]] = {name: [] for name in self.target.names}
        whole = {plan.name for plan in self.plans if plan.rows is None}
        for plan in self.plans:
            if plan.rows is not None:
                found[plan.name].append(Axes(plan.rows, plan.left_is_data))
        for name, sides in found.items():
            if name in whole or not sides:
                raise ValueError(
                    f"{name!r} is not a weight that multiplies, so its gradient has no terms by position; leave it "
                    "out: choose weights alone with parameters=[...]"
                )
        return found

    @torch.no_grad()
    def factors(
        self, examples: Sequence[Tensor], cotangents: Cotangents
    ) -> dict[str, list[tuple[Float[Tensor, "e t i"], Float[Tensor, "r e t o"]]]]:
        """Every use's input and, for every draw, its output gradient with respect to all outputs of an example.

        Over its positions, and over its uses, the outer products of the two are the parameter's gradient.

        Raises:
            ValueError: if a parameter is not a weight that multiplies, or these examples run other operations, or the
                sum over uses is not autograd's gradient.
        """
        count = len(examples[0])
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.axes()}
        f, trace = self._traced(examples)
        c = cotangents(f.detach()[:count])
        c = c if count == len(f) else torch.cat([c, torch.zeros_like(c)])
        deltas = self.pull(Node(f).settle(), trace.uses, c.movedim(2, 0), c.shape[0] * c.shape[1])
        terms: dict[str, list[Factored]] = defaultdict(list)
        for use, plan, delta in zip(trace.uses, self.plans, deltas, strict=True):
            assert plan.rows is not None
            left, right = (side.first(count) for side in product_sides(use, plan, delta, len(f)))
            terms[plan.name].append(Factored(plan.name, self.target.shapes[plan.name], plan.rows, [(left, right)]))
            a, b = (left, right) if plan.left_is_data else (right, left)
            found[plan.name].append((a.full()[0].to(b.values.dtype), b.full()))
        if self.guard.due():
            self.guard.check_sums(examples, cotangents, terms)
        return found

    @torch.no_grad()
    def inputs(self, examples: Sequence[Tensor]) -> dict[str, list[Side]]:
        """What arrives at every use, as rows (1, examples, positions, input), from a forward pass alone.

        Raises:
            ValueError: if a parameter is not a weight that multiplies, or these examples run other operations.
        """
        found: dict[str, list[Side]] = {name: [] for name in self.axes()}
        f, trace = self._traced(examples)
        for use, plan in zip(trace.uses, self.plans, strict=True):
            sides = product_sides(use, plan, use.output.detach().unsqueeze(0), len(f))
            found[plan.name].append(sides[0 if plan.left_is_data else 1].first(len(examples[0])))
        return found

    def _traced(self, examples: Sequence[Tensor]) -> tuple[Tensor, Trace]:
        """A recorded run in which every use is recognised; of one example, as two."""
        self.prepare(examples)
        f, trace = self.record(several(examples, 2) if len(examples[0]) == 1 else examples)
        if not self._recognised(trace, len(f)):
            raise ValueError(DIFFERENT)
        return f, trace


def signature(trace: Trace) -> list[tuple[str, str]]:
    """What must be the same in every run."""
    return [(use.kind, use.name) for use in trace.uses]


def halves(f: Float[Tensor, "e p k"], bit: int) -> tuple[Bool[Tensor, "e p"], Bool[Tensor, "e p"]]:
    """The samples whose number has a bit, and those whose has not."""
    number = torch.arange(f.shape[0] * f.shape[1], device=f.device).view(f.shape[:2])
    half = (number >> bit) % 2 == 1
    return half, ~half


def all_through(f: Tensor, node: Node, others: Sequence[Node]) -> bool:
    """Whether ``f`` depends on the other nodes only through ``node``."""
    ends, seen, ahead = {other.edge.node for other in others}, {node.edge.node}, [f.grad_fn]
    while ahead:
        here = ahead.pop()
        if here is None or here in seen:
            continue
        if here in ends:
            return False
        seen.add(here)
        ahead += [following for following, _ in here.next_functions]
    return True


def several(examples: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """``count`` examples; where there are fewer, they come again with their entries rolled, so that they differ."""

    def one(tensor: Tensor, i: int) -> Tensor:
        again, i = divmod(i, len(tensor))
        return tensor[i].roll(again, -1) if again and tensor.ndim > 1 else tensor[i]

    return tuple(torch.stack([one(tensor, i) for i in range(count)]) for tensor in examples)
