"""How a recorded use of a parameter is read: where samples lie in it, and what it adds to their gradients.

Both are found once, from a few examples, and are then the same for every batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from eigendecomp.factored.record import Use, Weight
from eigendecomp.factored.terms import Side, Term


class NotUnderstood(Exception):
    """A use of a parameter whose gradient does not factor in a way that is known here."""


@dataclass
class Layout:
    """Where the axis of samples is: the slow (``major``) or the fast part of one axis.

    With ``positions`` a sample is a position of an example, and both may have an axis to themselves.
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


def find_layout(use: Use, fewer: Use, deltas: Sequence[Float[Tensor, "e *shape"]]) -> Layout:
    """Where samples lie in the output of a use.

    Args:
        fewer: the same use in a run of all examples but one.
        deltas: what each example sends back alone, in one run or several: zero wherever another example lies.

    Raises:
        NotUnderstood: if samples do not lie along one axis.
    """
    count, less = len(deltas[0]), fewer.rows(fewer.output).shape
    shape = use.rows(use.output).shape
    own = torch.eye(count, dtype=torch.bool, device=deltas[0].device)
    for axis in range(1 if use.kind in ("matmul", "conv") else len(shape)):
        smaller = [*shape[:axis], shape[axis] // count * (count - 1), *shape[axis + 1 :]]
        if shape[axis] % count == 0 and smaller == list(less):
            for layout in (Layout(axis, True), Layout(axis, False)):
                if not any(layout.split(use.rows(delta), count, 1)[~own].any() for delta in deltas):
                    return layout
    raise NotUnderstood("samples do not lie along one axis")


def separate(
    index: Int[Tensor, "r c"], shape: Sequence[int]
) -> tuple[tuple[int, ...], Tensor | None, Tensor | None] | None:
    """Write a matrix of flat positions as rows over some axes of the parameter and columns over the others.

    Returns the axes of the rows, and where rows and columns are not simply in order, their positions within the
    flattened row and column axes; None if the matrix does not separate.
    """
    if not bool((index == index[:, :1] + index[:1] - index[:1, :1]).all()):
        return None
    row = torch.stack(torch.unravel_index(index[:, 0], shape), 0)
    column = torch.stack(torch.unravel_index(index[0], shape), 0)
    moves_row, moves_column = (row != row[:, :1]).any(1), (column != column[:, :1]).any(1)
    if bool((moves_row & moves_column).any()):
        return None
    # An axis that stands still (a slice of the parameter) goes to the rows if they lead, so that sides stay balanced.
    axes = tuple(a for a in range(len(shape)) if moves_row[a] or (not moves_column[a] and shape[a] > 1))
    rest = tuple(a for a in range(len(shape)) if a not in axes)
    return axes, _order(row, axes, shape), _order(column, rest, shape)


def _order(positions: Tensor, axes: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    flat = torch.zeros_like(positions[0])
    for axis in axes:
        flat = flat * shape[axis] + positions[axis]
    size = math.prod(shape[axis] for axis in axes)
    return None if len(flat) == size and bool((flat == torch.arange(size, device=flat.device)).all()) else flat


@dataclass
class Plan:
    """How one use is read, found once."""

    kind: str
    weight: Weight
    layout: Layout
    entries: Tensor  # what the use meets in the parameter
    rows: tuple[int, ...] | None = None  # for a product: the axes of the left side
    left_is_data: bool = False
    left: Tensor | None = None
    right: Tensor | None = None
    sizes: tuple[int, int] = (1, 1)
    in_order: bool = True  # for a sum: whether its entries are the whole parameter
    seen: list[Weight] = field(default_factory=list)  # other tensors that were found to hold the same entries

    def recognises(self, use: Use, examples: int) -> bool:
        """Whether a use in another run is the one that the plan was made for."""
        rows = use.rows(use.output).shape
        if (use.kind, use.name) != (self.kind, self.name) or rows[self.layout.axis] % examples:
            return False
        if use.weight is not self.weight and use.weight not in self.seen:
            if use.weight is None or not self._meets(use, examples):
                return False
            self.seen.append(use.weight)
        return True

    def _meets(self, use: Use, examples: int) -> bool:
        """Whether a use meets the entries of the parameter that the plan's does."""
        try:
            return torch.equal(read(use, self.layout, examples), self.entries)
        except NotUnderstood:
            return False

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def group(self) -> tuple:
        """Terms of one group can be joined: they have the same rows and columns, and share the same side or none."""
        own = self.layout.positions is not None
        return self.rows, id(self.left), id(self.right), self.left_is_data, self.kind == "lookup", own


def read(use: Use, layout: Layout, examples: int) -> Tensor:
    """The entries of the parameter that a use meets: the index of a product; for a sum, that of one sample."""
    if use.kind not in ("scale", "shift"):
        return use.index
    index = layout.split(use.index, examples)
    if not bool((index == index[:1]).all()):
        raise NotUnderstood("each sample uses entries of its own")
    # Axes of stride 0 are those over which the weight was spread: one entry stays.
    return index[0][tuple(slice(1) if stride == 0 else slice(None) for stride in index.stride()[1:])].flatten()


def make_plan(use: Use, layout: Layout, examples: int, shape: tuple[int, ...]) -> Plan:
    """Raises :class:`NotUnderstood` where the gradient does not factor."""
    assert use.weight is not None
    plan = Plan(use.kind, use.weight, layout, read(use, layout, examples))
    if use.kind in ("scale", "shift"):
        plan.in_order = torch.equal(plan.entries, torch.arange(math.prod(shape), device=plan.entries.device))
        return plan
    if use.kind == "conv" and use.options[-1] > 1:
        if not torch.equal(use.index.flatten(), torch.arange(math.prod(shape), device=use.index.device)):
            raise NotUnderstood("a grouped convolution with a rearranged kernel")
        return plan
    # Rows follow Δ (matmul, conv) or the vocabulary (lookup), columns the data or Δ.
    found = separate(use.index.mT if use.kind == "matmul" else use.index.flatten(1), shape)
    if found is None:
        raise NotUnderstood("the weight is used in an order that does not factor")
    plan.rows, plan.left, plan.right = found
    plan.left_is_data = use.kind == "lookup"
    first = math.prod(shape[axis] for axis in plan.rows)
    plan.sizes = (first, math.prod(shape) // first)
    if (len(shape) > 1 and 0 not in plan.rows) or plan.rows == ():  # the side with the parameter's first axis leads
        plan.rows = tuple(axis for axis in range(len(shape)) if axis not in plan.rows)
        plan.left, plan.right, plan.sizes = plan.right, plan.left, (plan.sizes[1], first)
        plan.left_is_data = not plan.left_is_data
    return plan


def product_sides(use: Use, plan: Plan, delta: Tensor, examples: int) -> Term:
    """A product's two factors, each (c, e, t, d)."""
    assert use.data is not None
    data, split = use.data.detach(), plan.layout.split
    if use.kind == "matmul":
        out, rows = split(use.rows(delta), examples, 1), split(use.rows(data, data=True), examples)
    elif use.kind == "lookup":
        out = split(delta, examples, 1).flatten(2, -2)
        rows = split(data, examples).flatten(1)
        rows = rows.masked_fill(rows == use.options[0], -1)
    else:
        out = split(delta, examples, 1).flatten(4).movedim(3, -1).flatten(2, -2)
        rows = split(patches(data, use), examples).mT.flatten(1, 2)
    rows = rows.unsqueeze(0)
    sides = (rows, out) if plan.left_is_data else (out, rows)
    return Side(sides[0], plan.sizes[0], plan.left), Side(sides[1], plan.sizes[1], plan.right)


def summed(use: Use, plan: Plan, delta: Tensor, examples: int, size: int) -> Float[Tensor, "c e w"]:
    """Gradients that are small, or that no two factors give: scales, shifts, grouped kernels."""
    if use.kind == "conv":
        assert use.data is not None
        groups = use.options[-1]
        rows = plan.layout.split(patches(use.data.detach(), use), examples).mT.flatten(1, 2).unflatten(-1, (groups, -1))
        out = plan.layout.split(delta, examples, 1).flatten(4).movedim(3, -1).flatten(2, -2)
        return torch.einsum("cetgo,etgi->cegoi", out.unflatten(-1, (groups, -1)), rows).flatten(2)
    if use.kind == "scale":
        assert use.data is not None
        delta = delta * use.data.detach()
    elif use.options == -1:
        delta = -delta
    value = plan.layout.split(delta, examples, 1)
    index = plan.layout.split(use.index, examples)
    still = [axis + 1 for axis in range(1, index.ndim) if index.stride(axis) == 0]
    value = (value.sum(still) if still else value).reshape(*value.shape[:2], -1)
    if not plan.in_order:
        value = value.new_zeros(*value.shape[:2], size).index_add_(-1, plan.entries, value)
    return value


def patches(data: Tensor, use: Use) -> Float[Tensor, "n patch positions"]:
    """What a convolution reads at every position, channel by channel."""
    stride, padding, dilation, _ = use.options
    kernel, axes = use.index.shape[2:], range(2, data.ndim)
    data = F.pad(data, [width for width in reversed(padding) for _ in range(2)])
    counts = [
        (data.shape[i + 2] - d * (k - 1) - 1) // s + 1 for i, (s, d, k) in enumerate(zip(stride, dilation, kernel))
    ]
    steps = data.stride()
    within = [steps[i] * d for i, d in zip(axes, dilation)]
    across = [steps[i] * s for i, s in zip(axes, stride)]
    view = data.as_strided((*data.shape[:2], *kernel, *counts), (*steps[:2], *within, *across), data.storage_offset())
    return view.reshape(len(data), -1, math.prod(counts))
