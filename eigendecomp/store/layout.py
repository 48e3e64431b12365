"""How the gradients of samples are written: as the factors of every use, or as numbers where these take fewer bytes.

Every tensor has its own way (:class:`Stored`), which all shards of a store share. A row of inputs that several samples
have in common, as all positions of a sequence do, is written once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from eigendecomp.directions import Shapes
from eigendecomp.factored.terms import Factored, Side, Term
from eigendecomp.gradients import Formed, Gradients, Part

SIDES = ("left", "right")


@dataclass(frozen=True)
class Rows:
    """One side of a sum of outer products, for every sample."""

    size: int  # of the axes that it runs over
    shape: list[int]  # of a sample's rows: (t, d), and (t,) for places in a vocabulary
    each: int  # samples that share them
    within: bool  # whether rows cover some of the entries alone, those of a constant of the store

    @classmethod
    def of(cls, side: Side, samples: int) -> tuple[Self, Tensor]:
        """A side, and its rows: (samples / each, *shape)."""
        shared = len(side.values) == 1
        rows = side.values[0] if shared else side.values.transpose(0, 1).flatten(0, 1)
        each = samples // len(rows) if len(rows) else 1
        kept = rows.to(torch.int32) if side.lookup else rows
        return cls(side.size, list(rows.shape[1:]), each, side.index is not None), kept

    def side(self, rows: Tensor, index: Tensor | None) -> Side:
        """The rows of samples that share nothing any more."""
        return Side((rows if rows.is_floating_point() else rows.long()).unsqueeze(0), self.size, index)


@dataclass(frozen=True)
class Stored:
    """The gradients of some tensors: of one as sums of outer products, or of several as numbers."""

    shapes: Mapping[str, tuple[int, ...]]
    axes: list[int]  # of the tensor, over which the left sides run
    terms: list[tuple[Rows, Rows]]  # none where numbers are written

    @classmethod
    def of(cls, part: Part, shapes: Shapes, place: int) -> tuple[Self, dict[str, Tensor], dict[str, Tensor]]:
        """A part's way, its tensors by name, and the constants that all samples share."""
        own = {name: tuple(shapes[name]) for name in part.names}
        if isinstance(part, Factored) and part.formed is None:
            terms, tensors, constants = [], {}, {}
            for number, term in enumerate(part.terms):
                sides = [Rows.of(side, len(part)) for side in term]
                for name, side, (_, rows) in zip(SIDES, term, sides, strict=True):
                    tensors[f"{place}/{number}/{name}"] = rows
                    if side.index is not None:
                        constants[f"{place}/{number}/{name}"] = side.index
                terms.append((sides[0][0], sides[1][0]))
            if not fewer(part, tensors):
                return cls(own, list(part.left_axes), terms), tensors, constants
        values = torch.cat([value.flatten(1) for value in part.dense().values()], 1)
        return cls(own, [], []), {f"{place}/numbers": values}, {}

    def part(self, place: int, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Part:
        """The gradients of samples whose rows are given."""
        if not self.terms:
            return Formed(self.shapes, tensors[f"{place}/numbers"])
        ((name, shape),) = self.shapes.items()
        terms: list[Term] = []
        for number, term in enumerate(self.terms):
            keys = [f"{place}/{number}/{side}" for side in SIDES]
            left, right = (
                rows.side(tensors[key], constants.get(key)) for rows, key in zip(term, keys, strict=True)
            )  # fmt: skip
            terms.append((left, right))
        return Factored(name, shape, tuple(self.axes), terms)

    def each(self, place: int) -> dict[str, int]:
        """How many samples share a row of every tensor."""
        if not self.terms:
            return {f"{place}/numbers": 1}
        return {
            f"{place}/{number}/{side}": rows.each
            for number, term in enumerate(self.terms)
            for side, rows in zip(SIDES, term, strict=True)
        }


def fewer(part: Part, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a part takes fewer bytes as numbers than as these factors."""
    numbers = sum(math.prod(value.shape[1:]) * value.itemsize for value in part.sample(0).dense().values())
    return numbers * len(part) < sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True)
class Layout:
    """How all gradients of a store are written."""

    parts: list[Stored]

    @classmethod
    def of(cls, gradients: Gradients) -> tuple[Self, dict[str, Tensor], dict[str, Tensor]]:
        """The way in which these gradients are written, their tensors, and what all samples share."""
        parts, tensors, constants = [], {}, {}
        for place, part in enumerate(gradients.parts):
            stored, rows, shared = Stored.of(part, gradients.shapes, place)
            parts.append(stored)
            tensors |= rows
            constants |= shared
        return cls(parts), tensors, constants

    @classmethod
    def from_plain(cls, plain: Sequence[Mapping[str, Any]]) -> Self:
        """What :meth:`plain` wrote."""
        parts = []
        for one in plain:
            terms = [(Rows(**left), Rows(**right)) for left, right in one["terms"]]
            shapes = {name: tuple(shape) for name, shape in one["shapes"]}
            parts.append(Stored(shapes, list(one["axes"]), terms))
        return cls(parts)

    def plain(self) -> list[dict[str, Any]]:
        """As plain values; shapes as a list, since their order counts and that of a mapping is lost in a file."""
        return [asdict(part) | {"shapes": list(part.shapes.items())} for part in self.parts]

    def each(self) -> dict[str, int]:
        """How many samples share a row, for every tensor."""
        return {key: each for place, part in enumerate(self.parts) for key, each in part.each(place).items()}

    def gradients(
        self, shapes: Shapes, tensors: Mapping[str, Tensor], constants: Mapping[str, Int[Tensor, " d"]]
    ) -> Gradients:
        """The gradients of samples, one row of every tensor for each."""
        parts = [part.part(place, tensors, constants) for place, part in enumerate(self.parts)]
        return Gradients(shapes, parts)
