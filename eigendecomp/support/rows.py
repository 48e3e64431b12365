"""A model's outputs as rows that are computed a few at a time, so that all of them need not be held.

A vocabulary of 50,000 makes 1.6 GB of 8,192 outputs, of which a reference keeps a thousand rows or a mean.
"""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigendecomp.support.examples import Examples, alike

HELD = 1 << 24  # numbers that are held; of more, outputs are computed again whenever they are asked for
PIECE = 1 << 22  # numbers computed at a time then


def slices(count: int, size: int) -> list[slice]:
    """``count`` things in parts of this size."""
    return [slice(start, start + size) for start in range(0, count, size)]


class Rows:
    """Rows (n, k) that are computed in pieces, from the first one again whenever some of them are asked for.

    References ask of predictions what these answer as a tensor does: their shape, some rows, and the mean.
    """

    def __init__(self, pieces: Callable[[], Iterator[Float[Tensor, "some k"]]], shape: tuple[int, int]) -> None:
        self.pieces, self.shape = pieces, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Int[Tensor, " m"]) -> Float[Tensor, "m k"]:
        numbers, chosen, start = torch.arange(len(self))[index], torch.empty(0), 0
        for piece in self.pieces():
            if start == 0:
                chosen = piece.new_empty(len(numbers), self.shape[1])
            here = ((numbers >= start) & (numbers < start + len(piece))).nonzero()[:, 0]
            chosen[here] = piece[numbers[here] - start]
            start += len(piece)
            if (numbers < start).all():
                break
        return chosen

    def mean(self, dim: Literal[0], keepdim: Literal[True]) -> Float[Tensor, "1 k"]:
        """The mean over the rows, for which a tensor's method needs these arguments."""
        return reduce(torch.add, (piece.sum(dim, keepdim) for piece in self.pieces())) / len(self)


class Outputs:
    """A model's outputs of some examples; held where they are few, else computed whenever they are asked for.

    Args:
        run: computes the outputs of all examples, so many examples at a time.
        shape: of the outputs, (examples, positions, outputs).
    """

    def __init__(self, run: Callable[[int], Iterator[Float[Tensor, "e p k"]]], shape: tuple[int, int, int]) -> None:
        self.shape, (e, p, k) = shape, shape
        few = e * p * k <= HELD
        self.held = torch.cat(list(run(256))) if few else None
        self.run, self.size = run, 256 if few else max(1, PIECE // (p * k))

    @classmethod
    def of(cls, target: Any, examples: Examples) -> Self:
        """The outputs of a target."""
        _, p, k = target.outputs(alike(examples, (tensor[:2] for tensor in examples))).shape
        return cls(partial(target.pieces, examples), (len(examples[0]), p, k))

    def pieces(self) -> Iterator[Float[Tensor, "some p k"]]:
        """The outputs in order, a few examples at a time."""
        return self.run(self.size) if self.held is None else iter(self.held.split(self.size))

    def all(self) -> Float[Tensor, "e p k"]:
        """The outputs of all examples at once."""
        return torch.cat(list(self.pieces())) if self.held is None else self.held

    def rows(self, function: Callable[[Tensor], Tensor]) -> Float[Tensor, "n k"] | Rows:
        """What a function makes of every sample's output, which stays as many numbers."""
        if self.held is not None:
            return function(self.held.flatten(0, 1))
        each = lambda: (function(piece.flatten(0, 1)) for piece in self.pieces())  # noqa: E731
        return Rows(each, (self.shape[0] * self.shape[1], self.shape[2]))
