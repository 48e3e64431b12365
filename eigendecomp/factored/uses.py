"""Each use of a weight as a sample of its own.

An output's gradient is a sum over the positions at which a weight is used, and a sum of many uses hides each. Here a
sample is one position of one example: the input there, and the gradient of *all* the example's outputs with respect to
the weight's output there. One backward pass gives them for every position, and no gradient is longer than its factors.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigendecomp.batches import HeldBatches
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.terms import Factored, Side, Term
from eigendecomp.gradients import Cotangents, Gradients
from eigendecomp.reference import Draws
from eigendecomp.support.examples import Examples, chunks

TINY = 1e-9  # of an example's largest gradient: below it a use has no gradient, and is not scaled up
HELD_BYTES = 1 << 28  # uses up to this size are kept instead of being captured at every step
CHUNK = 64  # examples captured at a time

Factors = tuple[Float[Tensor, "e t i"], Float[Tensor, "r e t o"]]


class UseSource:
    """The gradients of single uses, in factored form: (example, position, draw) is the order of the samples.

    Args:
        unit: whether every gradient is scaled to norm one, so that all uses count alike.

    Raises:
        ValueError: if a parameter is not a weight that multiplies, or weights are used at different numbers of
            positions.
    """

    def __init__(self, captured: CapturedSource, examples: Sequence[Tensor], unit: bool) -> None:
        self.captured, self.target, self.unit = captured, captured.target, unit
        self.axes = captured.axes()
        some = {name: x.values.shape[2] for name, (x, *_) in captured.inputs([x[:1] for x in examples]).items()}
        if len(set(some.values())) != 1:
            raise ValueError(f"the weights are used at different numbers of positions, {some}; choose some that agree")
        self.positions = next(iter(some.values()))

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients:
        """The gradients of the examples' uses."""
        return self.made(self.factors(examples, cotangents))

    def factors(self, examples: Sequence[Tensor], cotangents: Cotangents) -> dict[str, list[Factors]]:
        """Every use's input and output gradient, the latter scaled so that the use's gradient has unit norm."""
        factors = self.captured.factors(examples, cotangents)
        if not self.unit:
            return factors
        norms = self.made(factors).square_norms().sqrt().unflatten(0, (len(examples[0]), self.positions, -1))
        norms = norms.clamp_min(TINY * norms.amax((1, 2), keepdim=True)).clamp_min(torch.finfo(norms.dtype).tiny)
        scale = norms.reciprocal().movedim(2, 0).unsqueeze(-1)
        return {name: [(x, delta * scale) for x, delta in uses] for name, uses in factors.items()}

    def made(self, factors: dict[str, list[Factors]], index: Int[Tensor, " m"] | slice = slice(None)) -> Gradients:
        """Gradients of some of the uses from the factors of all."""
        parts = []
        for name, uses in factors.items():
            by_side: dict[tuple[int, ...], list[Term]] = defaultdict(list)
            for (x, delta), axes in zip(uses, self.axes[name], strict=True):
                a = Side(x.flatten(0, 1)[index][None, :, None], x.shape[-1])
                b = Side(delta.flatten(1, 2)[:, index].unsqueeze(2), delta.shape[-1])
                by_side[axes.left].append((a, b) if axes.input_is_left else (b, a))
            for left, terms in by_side.items():
                joined = [(Side.together([a for a, _ in terms]), Side.together([b for _, b in terms]))]
                parts.append(Factored(name, self.target.shapes[name], left, joined))
        if len(parts) > len(factors):
            raise ValueError("a weight is used both as it is and transposed, so its uses share no form; leave it out")
        return Gradients(self.target.shapes, parts)

    def bytes(self, examples: int) -> int:
        """Bytes that the factors of so many examples take, with one draw."""
        widths = sum(math.prod(self.target.shapes[name][a] for a in use.left) + math.prod(self.target.shapes[name])
                     // math.prod(self.target.shapes[name][a] for a in use.left)
                     for name, uses in self.axes.items() for use in uses)  # fmt: skip
        return examples * self.positions * widths * torch.finfo(self.target.dtype).bits // 8


def held_uses(source: UseSource, examples: Examples, draws: Draws, order: torch.Generator) -> HeldBatches:
    """Batches of uses that are captured once; for references that are fixed."""
    pieces = []
    for some in chunks(examples, CHUNK):
        asked = draws.again((len(some[0]), source.captured.outputs[0]), 1, order)
        pieces.append(source.factors(some, asked))
    factors = {
        name: [(torch.cat([p[name][i][0] for p in pieces]), torch.cat([p[name][i][1] for p in pieces], 1))
               for i in range(len(uses))]
        for name, uses in pieces[0].items()
    }  # fmt: skip
    return HeldBatches(len(examples[0]) * source.positions, lambda index, _: source.made(factors, index), order)
