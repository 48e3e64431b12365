"""Where things lie: a parameter's entries in memory and along the axes of its uses, and samples along axes."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(eq=False)
class Weight:
    """A tensor made of entries of one parameter."""

    name: str
    index: Int[Tensor, "..."]  # the flat position of every entry; a single one along axes of stride 0
    copies: dict[tuple, "Storage"] = field(default_factory=dict)

    @cached_property
    def partial(self) -> bool:
        """Whether there are other numbers between the entries."""
        return bool((self.index < 0).any())

    @cached_property
    def blocks(self) -> list[tuple[Int[Tensor, "i o"], list[int] | None]]:
        """The different matrices in a batch of matrices, each with its places in the batch (None: all)."""
        if len(self.index) == 1:
            return [(self.index[0], None)]
        places: dict[int, list[int]] = defaultdict(list)
        for place, first in enumerate(self.index[:, 0, 0].tolist()):
            places[first].append(place)
        if not all(bool((self.index[same] == self.index[same[:1]]).all()) for same in places.values()):
            places = {place: [place] for place in range(len(self.index))}
        return [(self.index[same[0]], None if len(places) == 1 else same) for same in places.values()]

    def copy(self, out: Tensor, key: tuple = (), index: Tensor | None = None) -> "Storage":
        """The storage of a new tensor with the entries of this one, or with some of them."""
        key = (*key, out.shape, out.stride())
        if key not in self.copies:
            values = (self.index if index is None else index).expand(out.shape)
            self.copies[key] = Storage(self.name, laid_out(values, out))
        return self.copies[key]


@dataclass(eq=False)
class Storage:
    """Memory that holds entries of one parameter, and the tensors over it that were met so far."""

    name: str
    flat: Int[Tensor, " elements"]  # flat position in the parameter, −1 for what is not of it
    weights: dict[tuple, Weight | None] = field(default_factory=dict)

    def weight(self, tensor: Tensor) -> Weight | None:
        """What a tensor in this memory holds of the parameter, if anything."""
        shape = tuple(n if stride else 1 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        key = shape, tensor.stride(), tensor.storage_offset()
        if key not in self.weights:
            index = self.flat.as_strided(*key)
            self.weights[key] = None if bool((index < 0).all()) else Weight(self.name, index)
        return self.weights[key]


def laid_out(values: Tensor, like: Tensor) -> Int[Tensor, " elements"]:
    """``values`` where ``like`` has its entries in its storage; −1 elsewhere."""
    size = like.untyped_storage().nbytes() // like.element_size()
    flat = torch.full((size,), -1, device=like.device)
    flat.as_strided(like.shape, like.stride(), like.storage_offset()).copy_(values)
    return flat


def storages(chosen: Mapping[str, Tensor]) -> tuple[dict[int, Storage], dict[str, str]]:
    """The storages of parameters by address, and which parameters cannot be told apart by them, with the reason."""
    by_address: dict[int, Storage] = {}
    shared: dict[str, str] = {}
    counting = torch.arange(max(p.numel() for p in chosen.values()), device=next(iter(chosen.values())).device)
    for name, p in chosen.items():
        address = p.untyped_storage().data_ptr()
        if address in by_address:
            shared |= dict.fromkeys((name, by_address[address].name), "it shares its memory with another parameter")
            continue
        positions = counting[: p.numel()]
        whole = p.is_contiguous() and p.untyped_storage().nbytes() == p.numel() * p.element_size()
        by_address[address] = Storage(name, positions if whole else laid_out(positions.view(p.shape), p))
    return by_address, shared


class NotUnderstood(Exception):
    """A use of a parameter whose gradient does not factor in a way that is known here."""


@dataclass
class Layout:
    """Which axis holds the examples, and whether they are its outer (``major``) or its inner factor.

    With ``positions`` samples are (example, position) pairs, on one axis or on two.
    """

    axis: int = 0
    major: bool = True
    positions: int | None = None

    def split(self, x: Tensor, examples: int, lead: int = 0) -> Tensor:
        """(lead…, shape) → (lead…, samples, the rest)."""
        count = examples
        if self.positions is not None:
            count = examples * self.positions
            if x.shape[lead] % count:
                x = x.flatten(lead, lead + 1)
        axis = self.axis + lead
        split = x.unflatten(axis, (count, -1) if self.major else (-1, count))
        return split.movedim(axis if self.major else axis + 1, lead)

    def fits(self, shape: Sequence[int], examples: int) -> bool:
        """Whether positions may lie so in a tensor of this shape: along its first axis, or along the first two."""
        assert self.positions is not None
        first, second = (*shape, 1, 1)[:2]
        return first % (examples * self.positions) == 0 or (first == examples and second % self.positions == 0)


@dataclass(frozen=True)
class Axes:
    """The axes of a parameter that one of its uses splits in two: those of one side, and which side that is.

    Where entries are not simply in order along a side, an index says where they lie in its flattened axes.
    """

    left: tuple[int, ...] = ()  # the other side covers the rest; empty where a gradient has no sides
    input_is_left: bool = False
    sizes: tuple[int, int] = (1, 1)  # of both sides' flattened axes
    indices: tuple[Tensor | None, Tensor | None] = (None, None)

    def of(self, inputs: bool) -> tuple[int, Tensor | None]:
        """The size and the index of the input's side, or of the output gradient's."""
        side = 0 if self.input_is_left == inputs else 1
        return self.sizes[side], self.indices[side]


def split_axes(index: Int[Tensor, "r c"], shape: Sequence[int], input_rows: bool) -> Axes:
    """The axes of a parameter along the rows and along the columns of a matrix of flat positions.

    The side with the parameter's first axis is the left one; ``input_rows`` tells which side the rows are.

    Raises:
        NotUnderstood: if no axes belong to the rows alone and the others to the columns alone.
    """
    row = torch.stack(torch.unravel_index(index[:, 0], shape), 0)
    column = torch.stack(torch.unravel_index(index[0], shape), 0)
    moves_row, moves_column = (row != row[:, :1]).any(1), (column != column[:, :1]).any(1)
    separates = bool((index == index[:, :1] + index[:1] - index[:1, :1]).all())
    if not separates or bool((moves_row & moves_column).any()):
        raise NotUnderstood("the weight is used in an order that does not factor")
    # An axis that stands still (a slice of the parameter) goes to the rows if they lead, so that sides stay balanced.
    axes = tuple(a for a in range(len(shape)) if moves_row[a] or (not moves_column[a] and shape[a] > 1))
    rest = tuple(a for a in range(len(shape)) if a not in axes)
    of_rows, of_columns = _order(row, axes, shape), _order(column, rest, shape)
    first, second = (math.prod(shape[a] for a in side) for side in (axes, rest))
    if (len(shape) > 1 and 0 not in axes) or axes == ():
        return Axes(rest, not input_rows, (second, first), (of_columns, of_rows))
    return Axes(axes, input_rows, (first, second), (of_rows, of_columns))


def _order(positions: Tensor, axes: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """Where entries lie within flattened axes; None if they fill them in order."""
    flat = torch.zeros_like(positions[0])
    for axis in axes:
        flat = flat * shape[axis] + positions[axis]
    size = math.prod(shape[axis] for axis in axes)
    return None if len(flat) == size and bool((flat == torch.arange(size, device=flat.device)).all()) else flat
