"""Per-sample gradients from one recorded forward pass and the backward passes of the samples' cotangents.

Backward passes to the outputs of a parameter's uses give their output gradients. A use's input and output gradient are
the parameter's gradient in factored form (:mod:`eigendecomp.factored.terms`). How uses are read is found once on a few
examples (:mod:`eigendecomp.factored.discover`), and checked there against one example run alone; later batches are
checked by a guard (:mod:`eigendecomp.factored.guard`). A parameter with a use that is not understood falls back to
:class:`FunctionalSource`, said once.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.factored.apart import PositionsMeet, output_gradients
from eigendecomp.factored.discover import DIFFERENT, Reading, discover
from eigendecomp.factored.guard import Guard, Mistaken, coarse, differing
from eigendecomp.factored.layouts import Axes
from eigendecomp.factored.local import through
from eigendecomp.factored.operations import Plan, Product, Use
from eigendecomp.factored.pieces import Recomputed, by_position
from eigendecomp.factored.prefix import NotCausal, Prefixes
from eigendecomp.factored.record import Recorder, Trace
from eigendecomp.factored.terms import Factored, Side, Term
from eigendecomp.gradients import Cotangents, Formed, FunctionalSource, Gradients, Part, at_own_position, sum_of
from eigendecomp.target import Target

log = logging.getLogger(__name__)

UNTRUE = "its factored gradient is not the true one"


class Capture:
    """Factored gradients of batches that are held at once.

    Args:
        terms: directions × rank, for which the cheaper form is chosen.
        form: whether gradients may be held as numbers where that is cheaper; without, positions can be told apart.
    """

    def __init__(self, target: Target, terms: int, form: bool) -> None:
        self.target, self.terms, self.form = target, terms, form
        self.recorder = Recorder(target)
        self.generator = torch.Generator().manual_seed(0)
        self.slow = FunctionalSource(target, [])
        self.reading: Reading
        self.prefixes: Prefixes | None = None  # where the model is causal and no one asks for single positions

    @property
    def fallback(self) -> dict[str, str]:
        """Parameters whose gradients are left to the oracle, and why."""
        return self.reading.fallback

    @property
    def outputs(self) -> tuple[int, int]:
        """Positions and outputs of an example."""
        return self.reading.outputs

    def discover(self, examples: Sequence[Tensor]) -> Float[Tensor, "e p k"]:
        """Find how uses are read in examples of this shape; returns the cotangents with which that was found."""
        self.reading, c = discover(self.recorder, examples, self.terms)
        self.leave({})
        self.prefixes = Prefixes.find(self, examples) if self.form else None
        return c

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Leave parameters to the oracle, and do not look at their uses any more."""
        self.reading.leave(reasons)
        self.recorder.leave(self.fallback)
        self.slow = FunctionalSource(self.target, list(self.fallback))
        self.prefixes = None  # which were read with these parameters' uses

    def say(self, names: Collection[str]) -> None:
        """Warn that these parameters are left to the oracle."""
        listed = "; ".join(f"{name} ({self.fallback[name]})" for name in names)
        log.warning("gradients are formed by torch.func.vmap, which is slower, for: %s", listed)

    def gradients(self, examples: Sequence[Tensor], cotangents: Callable[[Tensor], Tensor]) -> Gradients:
        """The gradients of the examples' samples, all held at once, whatever the budget."""
        trace, f = self.run(examples)
        if not self.reading.recognises(trace):
            self.leave(dict.fromkeys(self.target.names, DIFFERENT))
            self.say(self.target.names)
            return self.gradients(examples, cotangents)
        c = cotangents(f)
        ends = [] if self.prefixes is None else self.prefixes.ends(len(f), c.shape[2])
        late = self.piece(self.reading, trace, examples, c, ends[-1] if ends else 0)
        if self.prefixes is None or not ends:
            return late
        del trace  # so that its graph is free before the next one is there
        try:
            return by_position([*self.prefixes.gradients(examples, f, c, ends), late], len(f))
        except NotCausal:
            log.info("outputs depend on later positions here, so prefixes of sequences are not run any more")
            self.prefixes = None
            return self.gradients(examples, cotangents)

    def run(self, examples: Sequence[Tensor]) -> tuple[Trace, Float[Tensor, "e p k"]]:
        """A recorded run, and the outputs of the examples."""
        boundary = self.reading.boundary
        two = several(examples, 2) if len(examples[0]) == 1 else examples  # one alone may run through other operations
        trace = self.recorder.run(two, () if boundary is None else (boundary,))
        return trace, trace.output.output.detach()[: len(examples[0])]

    def piece(
        self, reading: Reading, trace: Trace, examples: Sequence[Tensor], c: Float[Tensor, "e p r k"], first: int = 0
    ) -> Gradients:
        """The gradients of the samples at the positions from ``first`` on, in a run whose uses are read so."""
        by_name: dict[str, list[tuple[Use, Plan, Tensor]]] = defaultdict(list)
        for use, plan, delta in zip(trace.uses, reading.plans, self._pulled(reading, trace, c, first), strict=True):
            by_name[plan.name].append((use, plan, delta))
        parts: list[Part] = []
        gradients = {name: gradient_of(name, some, c, first, self.target.dtype) for name, some in by_name.items()}
        through(self.recorder, trace, gradients)
        formed = self._formed(examples, c, first)
        for name, shape in self.target.shapes.items():
            if name in gradients:
                gradient = gradients[name]
            elif name not in self.fallback:  # never used
                gradient = Factored.zero(name, shape, c.new_zeros((c.shape[1] - first) * c.shape[2], len(c), 0))
            else:
                continue
            if isinstance(gradient, Tensor):
                formed[name] = gradient
                continue
            # If forming is cheaper at rank 1, it is at every rank; factors would only cost memory.
            if self.form and isinstance(gradient, Factored) and gradient.better_formed(self.terms, 1):
                gradient.form()
            parts.append(gradient)
        if formed:
            chosen = {name: shape for name, shape in self.target.shapes.items() if name in formed}
            parts.append(Formed(chosen, torch.cat([formed[name] for name in chosen], 1)))
        return Gradients(self.target.shapes, parts)

    def _pulled(self, reading: Reading, trace: Trace, c: Float[Tensor, "e p r k"], first: int) -> list[Tensor]:
        """Output gradients of every use, as :func:`eigendecomp.factored.apart.output_gradients` gives them."""
        two = c if len(c) > 1 else torch.cat([c, torch.zeros_like(c)])
        same = trace.operations == reading.operations
        boundary = trace.kept.get(-1 if reading.boundary is None else reading.boundary) if same else None
        try:
            return output_gradients(self.recorder, trace, reading.plans, boundary, two, first, self.generator)
        except PositionsMeet:
            log.warning("positions meet in layers that seemed to keep them apart; they are captured one by one now")
            reading.boundary = None
            for plan in reading.plans:
                plan.apart = None
        return self._pulled(reading, trace, c, first)

    def _formed(
        self, examples: Sequence[Tensor], c: Float[Tensor, "e p r k"], first: int
    ) -> dict[str, Float[Tensor, "n w"]]:
        """The gradients of the parameters that are left to the oracle."""
        if not self.fallback:
            return {}
        sizes = [math.prod(self.target.shapes[name]) for name in self.fallback]
        each = at_own_position(c)[:, first * c.shape[2] :]
        return dict(zip(self.fallback, self.slow.pull_back(examples, each).split(sizes, 1), strict=True))


class CapturedSource(Capture):
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
        super().__init__(target, terms, form)
        self.budget, self.guard = budget, Guard(target)
        self._check(several(examples, 3))

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
            while wrong := self.guard.wrong(pieces, gradients.weighted):
                was_wrong = True
                self._distrust(wrong)
                gradients = self._captured(pieces)
        if was_wrong and self.guard.calls > 1:
            raise Mistaken
        return gradients

    def prepare(self, examples: Sequence[Tensor]) -> None:
        """Find out again how uses are read, if these examples have other shapes than those seen last."""
        if [tensor.shape[1:] for tensor in examples] != self.reading.examples:
            self._check(several(examples, 3))

    def _pieces(self, examples: Sequence[Tensor], cotangents: Cotangents) -> list[tuple[list[Tensor], Cotangents]]:
        """The examples in parts whose gradients fit into the budget."""
        e, reading = len(examples[0]), self.reading
        none = torch.zeros(1, *self.outputs, dtype=self.target.dtype, device=self.target.device)
        draws = cotangents[slice(0, 1)](none).shape[2]
        chunks = math.ceil(e * (reading.bytes_per_example + draws * reading.bytes_per_draw) / self.budget)
        size = e if e <= 2 else max(2, math.ceil(e / max(1, chunks)))  # one alone would be run twice
        slices = [slice(start, start + size) for start in range(0, e, size)]
        return [([tensor[some] for tensor in examples], cotangents[some]) for some in slices]

    def _captured(self, pieces: Sequence[tuple[Sequence[Tensor], Cotangents]]) -> Gradients:
        if len(pieces) == 1:
            return self.gradients(*pieces[0])
        later = [partial(self.gradients, *piece) for piece in pieces]
        return Gradients(self.target.shapes, [Recomputed(self.target.names, later)])

    def _check(self, examples: tuple[Tensor, ...]) -> None:
        """Find how uses are read, and compare with one example run alone; what differs falls back or is refused."""
        said = set(self.fallback) if hasattr(self, "reading") else set()
        c = self.discover(examples)
        position = c.shape[1] // 2
        truth = self.guard.check_first(examples, c, position)
        while True:
            parts = self.gradients([x[:2] for x in examples], lambda _: c[:2].unsqueeze(2)).parts
            alone = {name: g for part in parts for name, g in part.sample(position).dense().items()}
            if not (wrong := differing(alone, truth, max(coarse(c.dtype), self.guard.tolerance))):
                break
            self._distrust(wrong)
        if set(self.fallback) - said:
            self.say(self.fallback)

    def _distrust(self, wrong: Sequence[str]) -> None:
        """Run no prefixes; leave parameters to the oracle; where it is wrong, to a backward pass for each example."""
        if self.prefixes is not None:
            self.prefixes = None
        elif set(wrong) - set(self.fallback):
            self.leave(dict.fromkeys(wrong, UNTRUE))
            self.say(wrong)
        elif not self.slow.loop:
            self.slow.loop = True
        else:
            raise ValueError(
                f"the gradient of {wrong[0]!r} for one example changes with the examples beside it; per-sample "
                "gradients need independent examples along the first axis"
            )

    def axes(self) -> dict[str, list[Axes]]:
        """The sides of every use of every parameter, in the order of :meth:`factors` and :meth:`inputs`.

        Raises:
            ValueError: if a parameter is not a weight that multiplies, so that its gradient has no two factors.
        """
        by_name: dict[str, list[Axes]] = {name: [] for name in self.target.names}
        for plan in self.reading.plans:
            for root in self.reading.roots(plan.name):
                by_name[root].append(plan.axes if root == plan.name else Axes())
        for name, uses in by_name.items():
            if not uses or not all(axes.left for axes in uses):
                raise ValueError(
                    f"{name!r} is not a weight that multiplies, so its gradient has no terms by position; leave it "
                    "out: choose weights alone with parameters=[...]"
                )
        return by_name

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
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.axes()}
        trace, products, f = self._products(examples)
        c, count = cotangents(f), len(f)
        if count == 1:
            c = torch.cat([c, torch.zeros_like(c)])
        deltas = self.recorder.pull(trace.output, trace.uses, c.movedim(2, 0), c.shape[0] * c.shape[1])
        by_name: dict[str, list[Factored]] = defaultdict(list)
        for use, plan, delta in zip(products, self.reading.plans, deltas, strict=True):
            left, right = (side.first(count) for side in use.sides(plan, delta, len(c)))
            by_name[plan.name].append(Factored(plan.name, plan.shape, plan.axes.left, [(left, right)]))
            a, b = (left, right) if plan.axes.input_is_left else (right, left)
            pairs[plan.name].append((a.full()[0].to(b.values.dtype), b.full()))
        sums = lambda w: {n: sum_of([part.weighted(w)[n] for part in some]) for n, some in by_name.items()}  # noqa: E731
        if self.guard.due() and (wrong := self.guard.wrong([(examples, cotangents)], sums, whole=True)):
            raise ValueError(
                f"the uses of {wrong[0]!r} do not add up to its gradient on these examples, so they cannot be told "
                "apart; leave the parameter out, or take whole outputs as samples"
            )
        return pairs

    @torch.no_grad()
    def inputs(self, examples: Sequence[Tensor]) -> dict[str, list[Side]]:
        """What arrives at every use, as rows (1, examples, positions, input), from a forward pass alone.

        Raises:
            ValueError: if a parameter is not a weight that multiplies, or these examples run other operations.
        """
        by_name: dict[str, list[Side]] = {name: [] for name in self.axes()}
        trace, products, f = self._products(examples)
        for use, plan in zip(products, self.reading.plans, strict=True):
            by_name[plan.name].append(use.input_side(plan, len(trace.output.output)).first(len(f)))
        return by_name

    def _products(self, examples: Sequence[Tensor]) -> tuple[Trace, list[Product], Float[Tensor, "e p k"]]:
        """A recorded run in which every use is recognised, its uses, and the outputs."""
        self.prepare(examples)
        trace, f = self.run(examples)
        if not self.reading.recognises(trace):
            raise ValueError(DIFFERENT)
        return trace, [use for use in trace.uses if isinstance(use, Product)], f


def gradient_of(
    name: str, uses: Sequence[tuple[Use, Plan, Tensor]], c: Float[Tensor, "e p r k"], first: int, dtype: torch.dtype
) -> Part | Float[Tensor, "n w"]:
    """The gradients of one parameter from its uses and their output gradients: factored, or numbers."""
    (e, p, r), own = c.shape[:3], slice(len(c) * c.shape[1])
    if first:  # of the samples of uses whose positions are apart
        own = torch.arange(e * p, device=c.device).view(e, p)[:, first:].flatten()
    left, *others = {plan.axes.left for _, plan, _ in uses}
    mixing = any(plan.apart is None for _, plan, _ in uses)
    formed: list[Tensor] = []
    terms: dict[tuple, list[Term]] = defaultdict(list)
    for use, plan, delta in uses:
        if delta.dtype != dtype:  # under mixed precision; sums over samples are taken in full
            use, delta = use.to(dtype), delta.to(dtype)
        total, some = max(e, 2), slice(e)
        if plan.apart is not None:
            total, some, plan = total * p, own, plan.apart
        if others or not isinstance(use, Product) or not left:
            value = use.gradient(plan, delta, max(e, 2))
            formed.append(value.unflatten(0, (total, -1))[some].flatten(0, 1))
            continue
        pair = [side.some(some) for side in use.sides(plan, delta, max(e, 2))]
        a, b = [side.by_position(p - first, r) for side in pair] if mixing and some is own else pair
        terms[plan.group].append((a, b))
    if formed:  # uses that split the parameter's axes differently, or do not factor, share no factored form
        return sum_of(formed)
    joined = [(Side.together([a for a, _ in some]), Side.together([b for _, b in some])) for some in terms.values()]
    return Factored(name, uses[0][1].shape, left, joined)


def several(examples: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """``count`` examples; where there are fewer, they come again with their entries rolled, so that they differ."""

    def one(tensor: Tensor, i: int) -> Tensor:
        again, i = divmod(i, len(tensor))
        return tensor[i].roll(again, -1) if again and tensor.ndim > 1 else tensor[i]

    return tuple(torch.stack([one(tensor, i) for i in range(count)]) for tensor in examples)
