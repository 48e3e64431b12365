"""Per-sample gradients that are never formed.

One ordinary batched forward pass runs under a dispatch mode that sees every operation below autograd. A weight is
recognised by the storage it lives in, through any view, transpose or copy, so it does not matter which module or
which function uses it, how often, or in which shape. Each use is recorded with its input and the graph edge of its
output; backward passes to those edges give the output gradients, and the two together are the gradient in factored
form: Σ_t Δ_nt ⊗ A_nt for a weight that multiplies (eq. 10); scales and biases are small and are formed.

A parameter with a use that is not understood falls back to :class:`FunctionalSource`, said once. How samples lie in
each use is read off the first examples, and every gradient is checked there against one example run alone.
"""

import logging
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eigendecomp.directions import Directions
from eigendecomp.gradients import Cotangents, Formed, FunctionalSource, Gradients, Part, spread, sum_of
from eigendecomp.target import Target

log = logging.getLogger(__name__)
aten = torch.ops.aten

MATMULS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1, aten.mv.default: 0}
SCALES = {aten.mul.Tensor, aten.mul_.Tensor}
SHIFTS = {aten.add.Tensor: 1, aten.add_.Tensor: 1, aten.sub.Tensor: -1, aten.sub_.Tensor: -1}
BATCH_NORMS = {aten.native_batch_norm.default: True, aten._native_batch_norm_legit_no_training.default: False}
COPIES = {aten.clone.default, aten._to_copy.default}


@dataclass(eq=False)
class Use:
    """One use of one parameter: output = op(data, weight).

    ``index`` gives the flat position in the parameter of every entry of the weight as the operation sees it: (in, out)
    for a matmul, (vocabulary, d) for a lookup, the kernel's shape for a conv, and the output's for a scale or shift.
    """

    kind: str  # "matmul", "conv", "lookup", "scale" or "shift"
    name: str
    index: Tensor
    output: Tensor
    data: Tensor | None = None
    options: Any = None  # matmul: (entry of the batch, transposed); conv: its arguments; lookup: padding; shift: sign
    edge: Any = None
    version: int = 0

    def rows(self, x: Tensor) -> Tensor:
        """A matmul's data or output as (…, rows, d); anything else as it is."""
        if self.kind != "matmul":
            return x
        entry, transposed = self.options
        x = x.mT if transposed else x
        if entry is None:
            return x
        return x.unsqueeze(-1) if entry == "vector" else x.flatten(-3, -2) if entry == "all" else x[..., entry, :, :]


class Trace(TorchDispatchMode):
    """Records every use of the chosen parameters during a forward pass."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.unknown: dict[str, str] = {}  # parameter: the operation that is not understood
        self.settled = 0
        self.names, self.starts, start = list(target.chosen), [], 0
        self.tags: dict[int, Tensor] = {}  # storage: the position, over all parameters, of each of its elements
        self.alive: list[Tensor] = []  # copies of weights, kept so that their storage is not used again
        for p in target.chosen.values():
            self._tag(p, torch.arange(start, start + p.numel(), device=p.device).view(p.shape))
            self.starts.append(start)
            start += p.numel()

    def _tag(self, tensor: Tensor, index: Tensor) -> None:
        storage = tensor.untyped_storage()
        flat = self.tags.setdefault(
            storage.data_ptr(), torch.full((storage.nbytes() // tensor.element_size(),), -1, device=tensor.device)
        )
        flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(index)
        self.alive.append(tensor)

    def _index(self, value: object) -> Tensor | None:
        """The positions that a tensor's entries have in the parameters; None for anything but a weight."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        flat = self.tags.get(value.untyped_storage().data_ptr())
        return None if flat is None else flat.as_strided(value.shape, value.stride(), value.storage_offset())

    def settle(self) -> None:
        """Take the graph edges of new outputs, before anything can change those outputs in place."""
        for use in self.uses[self.settled :]:
            if use.output.requires_grad:
                use.edge = torch.autograd.graph.get_gradient_edge(use.output)
        self.settled = len(self.uses)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.settle()
        found = {i: index for i, value in enumerate(args) if (index := self._index(value)) is not None}
        listed = [
            index for a in args if isinstance(a, (list, tuple)) for v in a if (index := self._index(v)) is not None
        ]
        out = func(*args, **(kwargs or {}))
        if not found and not listed:
            return out
        outputs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, Tensor)]
        if func in COPIES and out.is_floating_point():
            self._tag(out, found[0])
        elif all(self._index(o) is not None or not o.is_floating_point() for o in outputs) and not _writes(func):
            pass  # a view of a weight, or a question about it
        elif listed or not self._understood(func, args, out, dict(found)):
            for index in [*found.values(), *listed]:
                self.unknown.setdefault(self._owner(index)[0], str(func))
        return out

    def _owner(self, index: Tensor) -> tuple[str, Tensor]:
        """Whose positions these are, and the positions within that parameter."""
        number = bisect_right(self.starts, int(index.flatten()[0])) - 1
        return self.names[number], index - self.starts[number]

    def _add(self, kind: str, index: Tensor, output: Tensor, data: Tensor | None = None, options: Any = None) -> bool:
        name, local = self._owner(index)
        self.uses.append(Use(kind, name, local, output, data, options, version=0 if data is None else data._version))
        return True

    def _understood(self, func: Any, args: tuple, out: Any, found: dict[int, Tensor]) -> bool:
        """Record the uses in one operation; False if there is one that is not understood."""
        if func in MATMULS:
            bias = MATMULS[func]
            if bias and 0 in found:
                self._add("shift", found.pop(0).expand(out.shape), out)
            return len(args) == bias + 2 and (
                not found or self._matmul(out, args[bias:], found.get(bias), found.get(bias + 1))
            )
        if func is aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, _, groups = args
            if transposed or weight.ndim > 4 or 0 in found:
                return False
            if 2 in found:
                self._add("shift", _channels(found[2], out), out)
            return 1 not in found or self._add("conv", found[1], out, x, (stride, padding, dilation, groups))
        if func is aten.embedding.default:
            padding = args[2] if len(args) > 2 else -1
            return not any(args[3:]) and self._add("lookup", found[0], out, args[1], padding)
        if func is aten.index.Tensor:
            simple = args[0].ndim == 2 and len(args[1]) == 1 and args[1][0].dtype == torch.long
            return simple and self._add("lookup", found[0], out, args[1][0], -1)
        if func is aten.native_layer_norm.default and 0 not in found:
            y, mean, rstd = out
            return self._affine(
                y, (args[0] - mean) * rstd, found.get(2), found.get(3), lambda index, y: index.expand_as(y)
            )
        if func is aten.native_group_norm.default and 0 not in found:
            y, mean, rstd = out
            grouped = args[0].reshape(*mean.shape, -1)
            normalised = ((grouped - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).view(args[0].shape)
            return self._affine(y, normalised, found.get(1), found.get(2), _channels)
        if func in BATCH_NORMS and 0 not in found:
            x, mean, var, rest = args[0], args[3], args[4], args[5:]
            if BATCH_NORMS[func] and rest[0]:
                raise ValueError("batch normalisation uses the batch's statistics; call model.eval() first")
            mean, rstd = _channels(mean, x), _channels((var + rest[-1 if not BATCH_NORMS[func] else 2]).rsqrt(), x)
            return self._affine(out[0], (x - mean) * rstd, found.get(1), found.get(2), _channels)
        if func in SCALES and len(found) == 1:
            ((position, index),) = found.items()
            other = args[1 - position]
            if not isinstance(other, Tensor) or (position == 0 and func is aten.mul_.Tensor):
                return False
            return self._add("scale", index.expand(out.shape), out, other.expand(out.shape))
        if func in SHIFTS and len(args) == 2 and len(found) == 1:
            ((position, index),) = found.items()
            if (position == 0 and func in (aten.add_.Tensor, aten.sub_.Tensor)) or not isinstance(
                args[1 - position], Tensor
            ):
                return False
            return self._add("shift", index.expand(out.shape), out, options=SHIFTS[func] if position else 1)
        return False

    def _affine(self, y: Tensor, normalised: Tensor, scale: Tensor | None, shift: Tensor | None, spread: Any) -> bool:
        if scale is not None:
            self._add("scale", spread(scale, y), y, normalised)
        if shift is not None:
            self._add("shift", spread(shift, y), y)
        return True

    def _matmul(self, out: Tensor, factors: Sequence[Tensor], left: Tensor | None, right: Tensor | None) -> bool:
        transposed = left is not None
        if left is not None and right is not None:
            return False
        index, data = (left.mT, factors[1]) if left is not None else (right, factors[0])
        assert index is not None
        if index.ndim == 1 or data.ndim == 1:  # a matrix by a vector
            return not transposed and self._add("matmul", index[:, None], out, data, ("vector", False))
        if index.ndim == 2:
            return self._add("matmul", index, out, data, (None, transposed))
        if bool((index == index[:1]).all()):
            return self._add("matmul", index[0], out, data, ("all", transposed))
        return len(index) <= 64 and all(
            self._add("matmul", index[i], out, data, (i, transposed)) for i in range(len(index))
        )


def _writes(func: Any) -> bool:
    return func._schema.is_mutable


def _channels(per_channel: Tensor, x: Tensor) -> Tensor:
    """One number a channel, spread over a tensor whose axis 1 counts channels."""
    return per_channel.view(-1, *[1] * (x.ndim - 2)).expand(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# How samples lie in a use, and what it contributes


def samples_first(x: Tensor, examples: int, layout: tuple[int, bool], lead: int = 0) -> Tensor:
    """Move the sample axis to the front: (lead…, shape) → (examples, lead…, shape with the rest of the axis)."""
    axis, major = layout[0] + lead, layout[1]
    split = x.unflatten(axis, (examples, -1) if major else (-1, examples))
    return split.movedim(axis if major else axis + 1, 0)


def find_layout(deltas: Float[Tensor, "e *shape"], kind: str) -> tuple[int, bool] | None:
    """The axis that holds samples, and whether samples are its slow part; from deltas of one example after another.

    ``deltas[i]`` holds what example i alone sends back, so it is zero wherever another example lies.
    """
    count, shape = len(deltas), deltas.shape[1:]
    for axis in range(1 if kind in ("matmul", "conv") else len(shape)):
        for major in (True, False) if shape[axis] % count == 0 else ():
            split = samples_first(deltas, count, (axis, major), lead=1)
            own = torch.eye(count, dtype=torch.bool, device=deltas.device)
            if not split[~own].any():
                return axis, major
    return None


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
class Side:
    """One factor of Σ_t left_t ⊗ right_t: rows of numbers, or of positions in a vocabulary (one-hot rows).

    ``values`` is (e, c, t, d), with c = 1 where all cotangents of an example share it; a lookup's is (e, 1, t) and
    holds −1 for padding. ``index`` says where the d entries lie within the ``size`` of the flattened axes.
    """

    values: Tensor
    size: int
    index: Tensor | None = None

    @property
    def lookup(self) -> bool:
        return self.values.ndim == 3

    def dot(self, factor: Float[Tensor, "v k size"]) -> Float[Tensor, "e c t vk"]:
        """Inner products of every row with every direction's factor."""
        factor = (factor if self.index is None else factor[..., self.index]).flatten(0, 1)
        if self.lookup:
            return F.embedding(self.values.clamp_min(0), factor.T) * (self.values >= 0).unsqueeze(-1)
        return self.values @ factor.T

    def gram(self, other: "Side") -> Float[Tensor, "e c t s"]:
        """Inner products between the rows of two sides."""
        if self.lookup and other.lookup:
            return (self.values.unsqueeze(-1) == other.values.unsqueeze(-2)) & (self.values >= 0).unsqueeze(-1)
        if self.lookup:
            return other.gram(self).mT
        if other.lookup:
            chosen = other.values.clamp_min(0).unsqueeze(-2).expand(-1, self.values.shape[1], self.values.shape[2], -1)
            full = self.full().values
            return full.expand(len(other.values), -1, -1, -1).gather(-1, chosen) * (other.values >= 0).unsqueeze(-2)
        if self.index is other.index:
            return self.values @ other.values.mT
        return self.full().values @ other.full().values.mT

    def full(self) -> "Side":
        """The same rows over all ``size`` entries."""
        if self.lookup:
            onehot = F.one_hot(self.values.clamp_min(0), self.size) * (self.values >= 0).unsqueeze(-1)
            return Side(onehot, self.size)
        if self.index is None:
            return self
        values = self.values.new_zeros(*self.values.shape[:-1], self.size)
        return Side(values.index_copy(-1, self.index, self.values), self.size)

    def apart(self, other: "Side") -> bool:
        """Whether the two cover different entries, so that all inner products are zero."""
        if self.index is None or other.index is None or self.index is other.index:
            return False
        return not bool(torch.isin(self.index, other.index).any())


class Factored:
    """Gradients of one tensor as Σ over uses and positions of left ⊗ right, never formed."""

    def __init__(
        self, name: str, shape: tuple[int, ...], rows: tuple[int, ...], terms: list[tuple[Side, Side]]
    ) -> None:
        self.names = (name,)
        self.shape, self.rows, self.terms = shape, rows, terms

    def inner(self, directions: Directions) -> Tensor:
        """Eq. 10: Σ_t Σ_k (left_t · L_k)(right_t · R_k)."""
        left, right = directions.pair(self.names[0], self.rows)
        v, k = left.shape[:2]
        products = []
        for a, b in self.terms:
            product = (a.dot(left) * b.dot(right)).sum(2)
            products.append(product.unflatten(-1, (v, k)).sum(-1) if k > 1 else product)
        return sum_of(products).flatten(0, 1)

    def square_norms(self) -> Tensor:
        """Eq. 11: Σ_{t,s} (left_t · left_s)(right_t · right_s), over all pairs of uses."""
        total = []
        for i, (a, b) in enumerate(self.terms):
            for j, (c, d) in enumerate(self.terms[: i + 1]):
                if not (a.apart(c) or b.apart(d)):
                    product = (a.gram(c) * b.gram(d)).sum((-2, -1))
                    total.append(product if i == j else 2 * product)
        return sum_of(total).flatten()

    def dense(self) -> dict[str, Tensor]:
        columns = [axis for axis in range(len(self.shape)) if axis not in self.rows]
        pairs = [(a.full().values, b.full().values) for a, b in self.terms]
        dtype = next(x.dtype for pair in pairs for x in pair if x.is_floating_point())
        formed = [left.to(dtype).mT @ right.to(dtype) for left, right in pairs]
        order = [*self.rows, *columns]
        matrix = sum_of(formed).flatten(0, 1)
        tensor = matrix.reshape(len(matrix), *(self.shape[axis] for axis in order))
        return {self.names[0]: tensor.permute(0, *(1 + order.index(axis) for axis in range(len(order))))}


@dataclass
class Plan:
    """How one use is read, found once."""

    kind: str
    name: str
    layout: tuple[int, bool]
    copied: bool = False  # its data is changed in place later, so it must be copied
    rows: tuple[int, ...] | None = None  # for a product: the axes of the left side
    left_is_data: bool = False
    left: Tensor | None = None
    right: Tensor | None = None
    sizes: tuple[int, int] = (1, 1)
    positions: Tensor | None = None  # for a sum: where its entries lie in the parameter


class CapturedSource:
    """Factored gradients from one forward pass and the backward passes of the cotangents.

    Args:
        examples: a few examples, on which layouts are found and gradients are checked.
        terms: directions × rank, by which the cheaper form of every tensor is chosen.
        budget: bytes that the gradients of one chunk of examples may take.

    Raises:
        ValueError: if what the model gives for one example depends on the examples beside it, or on chance.
    """

    def __init__(self, target: Target, examples: Sequence[Tensor], *, terms: int = 64, budget: int = 1 << 29) -> None:
        self.target, self.terms, self.budget = target, terms, budget
        self.plans: list[Plan] = []
        self.formed: set[str] = set()
        self.fallback: dict[str, str] = {}
        self._prepare(tuple(t[torch.arange(3) % len(t)] for t in examples))

    # ---- recording

    def _trace(self, examples: Sequence[Tensor]) -> tuple[Tensor, list[Use], dict[str, str]]:
        with torch.enable_grad(), Trace(self.target) as trace:
            f = self.target.call(examples)
        trace.settle()
        return f, [use for use in trace.uses if use.edge is not None], trace.unknown

    def _deltas(self, f: Tensor, uses: Sequence[Use], c: Float[Tensor, "e c p k"]) -> list[Tensor]:
        """Output gradients (c, *output) of every use, for several cotangents of every example."""
        edges = [use.edge for use in uses]
        last = c.shape[1] - 1
        rows = [
            torch.autograd.grad(f, edges, c[:, i], retain_graph=i < last, allow_unused=True) for i in range(last + 1)
        ]
        zeros = [torch.zeros_like(use.output) if rows[0][i] is None else None for i, use in enumerate(uses)]
        return [
            torch.stack([zeros[i] if row[i] is None else row[i] for row in rows])
            if last
            else (zeros[i] if rows[0][i] is None else rows[0][i]).unsqueeze(0)
            for i in range(len(uses))
        ]

    # ---- once: layouts, forms, checks

    def _prepare(self, examples: tuple[Tensor, ...]) -> None:
        target = self.target
        f, uses, unknown = self._trace(examples)
        generator = torch.Generator().manual_seed(0)
        c = torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)
        one_by_one = torch.eye(len(f), dtype=f.dtype, device=f.device)[:, :, None, None] * c.unsqueeze(1)
        deltas = self._deltas(f, uses, one_by_one)
        self.fallback = dict(unknown)
        for use, delta in zip(uses, deltas, strict=True):
            try:
                self.plans.append(self._plan(use, delta))
            except _NotUnderstood as reason:
                self.fallback.setdefault(use.name, str(reason))
                self.plans.append(Plan(use.kind, use.name, (0, True)))
        by_name = defaultdict(list)
        for plan in self.plans:
            by_name[plan.name].append(plan)
        for name, plans in by_name.items():
            if any(plan.rows != plans[0].rows or plan.rows is None for plan in plans) or self._forming_is_cheaper(
                name, plans
            ):
                self.formed.add(name)
        self._check(examples, f, c)
        if self.fallback:
            reasons = "; ".join(f"{name} ({reason})" for name, reason in self.fallback.items())
            log.warning("gradients are formed by torch.func.vmap, which is slower, for: %s", reasons)

    def _plan(self, use: Use, delta: Tensor) -> Plan:
        layout = find_layout(use.rows(delta), use.kind)
        if layout is None:
            raise _NotUnderstood("samples do not lie along one axis")
        plan = Plan(use.kind, use.name, layout)
        plan.copied = use.data is not None and use.data._version != use.version
        shape = self.target.shapes[use.name]
        if use.kind in ("scale", "shift"):
            index = samples_first(use.index, len(delta), layout)
            if not bool((index == index[:1]).all()):
                raise _NotUnderstood("each sample uses entries of its own")
            plan.positions = _reduce(index[0], index[0]).flatten()
            if torch.equal(plan.positions, torch.arange(math.prod(shape), device=index.device)):
                plan.positions = None
            return plan
        matrix = use.index.flatten(1) if use.kind == "conv" else use.index if use.kind == "lookup" else use.index.mT
        if use.kind == "conv" and use.options[-1] > 1:
            if not torch.equal(matrix.flatten(), torch.arange(matrix.numel(), device=matrix.device)):
                raise _NotUnderstood("a grouped convolution with a rearranged kernel")
            return plan
        # matrix: rows follow Δ (matmul, conv) or the vocabulary (lookup), columns follow the data or Δ
        found = separate(matrix, shape)
        if found is None:
            raise _NotUnderstood("the weight is used in an order that does not factor")
        plan.rows, plan.left, plan.right = found
        plan.left_is_data = use.kind == "lookup"
        first = math.prod(shape[axis] for axis in plan.rows)
        plan.sizes = first, math.prod(shape) // first
        if (len(shape) > 1 and 0 not in plan.rows) or plan.rows == ():  # the side with the parameter's first axis leads
            plan.rows = tuple(axis for axis in range(len(shape)) if axis not in plan.rows)
            plan.left, plan.right, plan.sizes = plan.right, plan.left, plan.sizes[::-1]
            plan.left_is_data = not plan.left_is_data
        return plan

    def _forming_is_cheaper(self, name: str, plans: list[Plan]) -> bool:
        return False

    def _check(self, examples: tuple[Tensor, ...], f: Tensor, c: Tensor) -> None:
        """Compare with one example run alone; what differs falls back, and what differs still is refused."""
        target = self.target
        tolerance = 30 * torch.finfo(f.dtype).eps ** 0.5 if f.dtype != torch.float64 else 1e-7
        with torch.no_grad():
            again = target.call(examples)
        if not torch.allclose(again, f.detach(), rtol=tolerance, atol=tolerance):
            raise ValueError("two runs of the model on the same inputs differ; call model.eval() and remove randomness")
        with torch.enable_grad():
            f0 = target.call([t[:1] for t in examples])
        if not torch.allclose(f0.detach(), again[:1], rtol=tolerance, atol=tolerance * float(again.abs().max())):
            raise ValueError(
                "the model's output for one example changes with the examples beside it; per-sample gradients need "
                "independent examples along the first axis (is a layer normalising over the batch?)"
            )
        truth = torch.autograd.grad(f0, list(target.chosen.values()), c[:1], allow_unused=True)
        for attempt in range(2):
            found = self._gradients(examples, lambda _: c.unsqueeze(1)).dense()
            wrong = []
            for (name, p), expected in zip(target.chosen.items(), truth, strict=True):
                expected = torch.zeros_like(p) if expected is None else expected
                if not (found[name][0].reshape(p.shape) - expected).norm() <= tolerance * (expected.norm() + 1e-6):
                    wrong.append(name)
            if not wrong:
                return
            if attempt:
                raise ValueError(f"the gradient of {wrong[0]!r} for one example changes with the examples beside it")
            self.fallback.update(dict.fromkeys(wrong, "its factored gradient is not the true one"))

    # ---- each time

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients:
        """The gradients of the examples' samples, in factored form where that is cheaper."""
        return self._gradients(examples, lambda f: spread(cotangents(f.detach())))

    def _gradients(self, examples: Sequence[Tensor], cotangents: Any) -> Gradients:
        f, uses, _ = self._trace(examples)
        c = cotangents(f)
        if [(use.kind, use.name) for use in uses] != [(plan.kind, plan.name) for plan in self.plans]:
            raise ValueError(
                "the model runs different operations for different inputs, so its gradients cannot be captured; give "
                "inputs of one shape and a model without data-dependent branches"
            )
        formed: dict[str, Tensor] = {}
        terms: dict[str, list[tuple[Side, Side]]] = defaultdict(list)
        for use, plan, delta in zip(uses, self.plans, self._deltas(f, uses, c), strict=True):
            if plan.name in self.fallback:
                continue
            if plan.rows is None:
                value = self._summed(use, plan, delta, len(f))
                formed[plan.name] = formed[plan.name] + value if plan.name in formed else value
            else:
                terms[plan.name].append(self._sides(use, plan, delta, len(f)))
        parts: list[Part] = []
        for name, pairs in terms.items():
            # Uses of one parameter that split its axes differently cannot share a factored part.
            by_rows = defaultdict(list)
            for plan, pair in zip(
                [plan for plan in self.plans if plan.name == name and plan.rows is not None], pairs, strict=True
            ):
                by_rows[plan.rows].append(pair)
            factored = [Factored(name, self.target.shapes[name], rows, pair) for rows, pair in by_rows.items()]
            if name in self.formed:
                for part in factored:
                    value = part.dense()[name].flatten(1)
                    formed[name] = formed[name] + value if name in formed else value
            else:
                parts += factored
        if self.fallback:
            names = [name for name in self.target.names if name in self.fallback]
            values = FunctionalSource(self.target, names).pull_back(examples, c)
            sizes = [math.prod(self.target.shapes[name]) for name in names]
            formed.update(zip(names, values.split(sizes, 1), strict=True))
        for name in self.target.names:
            if name not in formed and name not in terms:  # never used: its gradient is zero
                formed[name] = f.new_zeros(c.shape[0] * c.shape[1], math.prod(self.target.shapes[name]))
        if formed:
            shapes = {name: self.target.shapes[name] for name in self.target.names if name in formed}
            parts.append(Formed(shapes, torch.cat([formed[name] for name in shapes], 1)))
        return Gradients(self.target.shapes, parts)

    def _sides(self, use: Use, plan: Plan, delta: Tensor, examples: int) -> tuple[Side, Side]:
        """A product's two factors, each (e, c, t, d)."""
        assert use.data is not None
        data = use.data.detach()
        if use.kind == "matmul":
            out = samples_first(use.rows(delta), examples, plan.layout, 1)
            rows = samples_first(use.rows(data), examples, plan.layout).unsqueeze(1)
        elif use.kind == "lookup":
            out = samples_first(delta, examples, plan.layout, 1).flatten(2, -2)
            rows = samples_first(data, examples, plan.layout).flatten(1).unsqueeze(1)
            rows = rows.masked_fill(rows == use.options, -1)
        else:
            patches = samples_first(unfold(data, use), examples, plan.layout)  # (e, t, patch, positions)
            rows = patches.mT.flatten(1, 2).unsqueeze(1)
            out = samples_first(delta, examples, plan.layout, 1).movedim(3, -1).flatten(2, -2)
        sides = (rows, out) if plan.left_is_data else (out, rows)
        return Side(sides[0], plan.sizes[0], plan.left), Side(sides[1], plan.sizes[1], plan.right)

    def _summed(self, use: Use, plan: Plan, delta: Tensor, examples: int) -> Float[Tensor, "n w"]:
        """Gradients that are small, or that no two factors give: scales, shifts, grouped kernels."""
        size = math.prod(self.target.shapes[plan.name])
        if use.kind == "conv":
            groups = use.options[-1]
            patches = samples_first(unfold(use.data, use), examples, plan.layout)  # type: ignore[arg-type]
            patches = patches.mT.flatten(1, 2).unflatten(-1, (groups, -1))
            out = (
                samples_first(delta, examples, plan.layout, 1).movedim(3, -1).flatten(2, -2).unflatten(-1, (groups, -1))
            )
            return torch.einsum("ectgo,etgi->ecgoi", out, patches).flatten(0, 1).flatten(1)
        if use.kind == "scale":
            assert use.data is not None
            delta = delta * use.data.detach()
        elif use.options == -1:
            delta = -delta
        split = samples_first(delta, examples, plan.layout, 1)
        index = samples_first(use.index, examples, plan.layout)[0]
        value = _reduce(split, index).flatten(2)
        if plan.positions is not None:
            value = value.new_zeros(*value.shape[:2], size).index_add_(-1, plan.positions, value)
        return value.flatten(0, 1)


def unfold(data: Tensor, use: Use) -> Float[Tensor, "n patch positions"]:
    """The patches that a convolution reads, channel by channel, for one or two spatial axes."""
    stride, padding, dilation, _ = use.options
    kernel = use.index.shape[2:]
    if len(kernel) == 1:
        data, kernel = data.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    return F.unfold(data.detach(), kernel, dilation, padding, stride)


def _reduce(x: Tensor, index: Tensor) -> Tensor:
    """Sum the trailing axes of ``x`` over which a weight was spread (those along which its index stands still)."""
    lead = x.ndim - index.ndim
    spread = [axis for axis in range(index.ndim) if index.stride(axis) == 0 or index.shape[axis] == 1]
    if not spread:
        return x
    return (
        x[(..., *(0 if axis in spread else slice(None) for axis in range(index.ndim)))]
        if x is index
        else x.sum([axis + lead for axis in spread])
    )


class _NotUnderstood(Exception):
    pass
