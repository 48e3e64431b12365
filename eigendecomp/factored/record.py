"""Seeing every use of chosen parameters in a forward pass, whatever module or function makes it.

The pass runs under a dispatch mode that is shown every operation below autograd. A weight is recognised by the memory
it lies in, through any view, transpose or copy. Each use is recorded with its input and with the place of its output in
the graph of derivatives, to which backward passes can then be run.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operations with a weight, and where in their arguments what matters stands.
MATMULS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1, aten.mv.default: 0}
SCALES = {aten.mul.Tensor, aten.mul_.Tensor}
SHIFTS = {aten.add.Tensor: 1, aten.add_.Tensor: 1, aten.sub.Tensor: -1, aten.sub_.Tensor: -1}
BATCH_NORMS = {aten.native_batch_norm.default: True, aten._native_batch_norm_legit_no_training.default: False}
COPIES = {aten.clone.default, aten._to_copy.default}

MOST_BLOCKS = 64  # different matrices in one batched product, as attention heads are


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
        if not all(bool((self.index[found] == self.index[found[:1]]).all()) for found in places.values()):
            places = {place: [place] for place in range(len(self.index))}
        return [(self.index[found[0]], None if len(places) == 1 else found) for found in places.values()]

    def copy(self, out: Tensor, key: tuple = (), index: Tensor | None = None) -> "Storage":
        """The storage of a new tensor with the entries of this one, or with some of them."""
        key = (*key, out.shape, out.stride())
        if key not in self.copies:
            values = (self.index if index is None else index).expand(out.shape)
            self.copies[key] = Storage(self.name, _laid_out(values, out))
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


def _laid_out(values: Tensor, like: Tensor) -> Int[Tensor, " elements"]:
    """``values`` where ``like`` has its entries in its storage; −1 elsewhere."""
    size = like.untyped_storage().nbytes() // like.element_size()
    flat = torch.full((size,), -1, device=like.device)
    flat.as_strided(like.shape, like.stride(), like.storage_offset()).copy_(values)
    return flat


def storages(chosen: Mapping[str, Tensor]) -> tuple[dict[int, Storage], dict[str, str]]:
    """The storages of parameters by address, and which parameters cannot be told apart by them, with the reason."""
    found: dict[int, Storage] = {}
    shared: dict[str, str] = {}
    counting = torch.arange(max(p.numel() for p in chosen.values()), device=next(iter(chosen.values())).device)
    for name, p in chosen.items():
        address = p.untyped_storage().data_ptr()
        if address in found:
            shared |= dict.fromkeys((name, found[address].name), "it shares its memory with another parameter")
            continue
        positions = counting[: p.numel()]
        whole = p.is_contiguous() and p.untyped_storage().nbytes() == p.numel() * p.element_size()
        found[address] = Storage(name, positions if whole else _laid_out(positions.view(p.shape), p))
    return found, shared


@dataclass(eq=False)
class Node:
    """The output of an operation and its place in the graph of derivatives, known when the next operation runs."""

    output: Tensor
    edge: Any = None

    @property
    def place(self) -> tuple:
        """What two nodes with one output have in common."""
        return self.edge.node, self.edge.output_nr

    def settle(self) -> "Node":
        """Take the place in the graph, before anything can change the output in place."""
        if self.output.requires_grad:
            self.edge = get_gradient_edge(self.output)
        return self

    def rows(self, x: Tensor, data: bool = False) -> Tensor:
        """The output (or its gradients), or the data, with what belongs to different samples along one axis."""
        return x


@dataclass(eq=False)
class Use(Node):
    """One use of one parameter: output = op(data, weight).

    ``index`` gives the flat position in the parameter of every entry of the weight as the operation sees it: (in, out)
    for a matmul, (vocabulary, d) for a lookup, the kernel's shape for a conv, and the output's for a scale or shift.
    """

    kind: str = ""  # "matmul", "conv", "lookup", "scale" or "shift"
    weight: Weight | None = None
    index: Any = None
    data: Tensor | None = None
    # matmul: (places in the batch, transposed); conv: its arguments; lookup: (padding, number); shift: sign
    options: Any = None

    def to(self, dtype: torch.dtype) -> "Use":
        """The same use with its data, if they are numbers, in another precision."""
        wanted = self.data is not None and self.data.is_floating_point()
        return replace(self, data=self.data.to(dtype)) if wanted else self  # type: ignore[union-attr]

    @property
    def name(self) -> str:
        assert self.weight is not None
        return self.weight.name

    def rows(self, x: Tensor, data: bool = False) -> Tensor:
        """A matmul's as (…, rows, d); anything else as it is."""
        if self.kind != "matmul":
            return x
        places, transposed = self.options
        if places == "vector":
            return x if data else x.unsqueeze(-1)
        x = x.mT if transposed else x
        if places == "matrix":
            return x
        return (x if places is None else x[..., places, :, :]).flatten(-3, -2)


class Trace(TorchDispatchMode):
    """Records every use of the chosen parameters during a forward pass.

    Args:
        storages: where the parameters' entries lie.
        constant: numbers of those lookups, in order, whose rows are the same for all examples: they copy the weight.
        keep: numbers of operations whose outputs are wanted; None for all.
        noise: disturbs the output of every use, so that units which are dead on the given examples live.
    """

    def __init__(
        self,
        storages: Mapping[int, Storage],
        constant: Collection[int] = (),
        keep: Collection[int] | None = (),
        noise: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.storages, self.constant, self.keep, self.noise = dict(storages), constant, keep, noise
        self.operations: list[Any] = []
        self.uses: list[Use] = []
        self.kept: dict[int, Node] = {}
        self.unknown: dict[str, str] = {}  # parameter: the operation that is not understood
        self.lookups = 0
        self.waiting: list[Node] = []
        self.alive: list[Tensor] = []  # copies of weights, kept so that their memory is not used again

    def weight(self, value: object) -> Weight | None:
        """The parameter's entries that a tensor is made of, if it is."""
        if not isinstance(value, Tensor):
            return None
        storage = self.storages.get(value.untyped_storage().data_ptr())
        return None if storage is None or not value.is_floating_point() else storage.weight(value)

    def settle(self) -> None:
        for node in self.waiting:
            node.settle()
        self.waiting.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.settle()
        kwargs = kwargs or {}
        found = {i: weight for i, value in enumerate(args) if (weight := self.weight(value)) is not None}
        lists = [value for value in (*args, list(kwargs.values())) if isinstance(value, (list, tuple))]
        others = [weight for value in lists for item in value if (weight := self.weight(item)) is not None]
        out = func(*args, **kwargs)
        if func is not aten.detach.default:  # which torch calls more often when outputs are kept
            number = len(self.operations)
            self.operations.append(func)
            if isinstance(out, Tensor) and (self.keep is None or number in self.keep):
                self.kept[number] = Node(out)
                self.waiting.append(self.kept[number])
        if not found and not others:
            return out
        plain, count = not kwargs or func in COPIES, len(self.uses)  # a keyword may scale a term
        plain = plain and not any(weight.partial for weight in found.values())
        if others or not plain or not self._understood(func, args, out, dict(found)):
            for weight in (*found.values(), *others):
                self.unknown.setdefault(weight.name, str(func))
        if self.noise is not None and len(self.uses) > count:
            y = self.uses[-1].output
            y += torch.randn(y.shape, generator=self.noise).to(y) * (1 + y.square().mean().sqrt())
        return out

    def _copied(self, out: Tensor, storage: Storage) -> bool:
        self.storages[out.untyped_storage().data_ptr()] = storage
        self.alive.append(out)
        return True

    def _add(
        self, kind: str, weight: Weight, index: Tensor, output: Tensor, data: Tensor | None = None, options: Any = None
    ) -> bool:
        self.uses.append(Use(output, None, kind, weight, index, data, options))
        self.waiting.append(self.uses[-1])
        return True

    def _shift(self, weight: Weight, out: Tensor, index: Tensor | None = None, sign: int = 1) -> bool:
        return self._add("shift", weight, (weight.index if index is None else index).expand(out.shape), out, None, sign)

    def _understood(self, func: Any, args: tuple, out: Any, found: dict[int, Weight]) -> bool:
        """Record the uses in one operation; False if there is one that is not understood."""
        if func in COPIES and out.is_floating_point():
            return self._copied(out, found[0].copy(out))
        if func in MATMULS:
            bias = MATMULS[func]
            if bias and 0 in found:
                self._shift(found.pop(0), out)
            return len(args) == bias + 2 and self._matmul(out, args[bias:], found.get(bias), found.get(bias + 1))
        if func is aten.convolution.default:
            x, weight, _, stride, padding, dilation, transposed, _, groups = args
            if transposed or 0 in found:
                return False
            if 2 in found:
                self._shift(found[2], out, _channels(found[2].index, out))
            options = stride, padding, dilation, groups
            return 1 not in found or self._add("conv", found[1], found[1].index, out, x, options)
        if func is aten.embedding.default:
            return not any(args[3:]) and self._lookup(found[0], out, args[1], args[2] if len(args) > 2 else -1)
        if func is aten.index.Tensor:
            simple = args[0].ndim == 2 and len(args[1]) == 1 and args[1][0].dtype == torch.long
            return simple and self._lookup(found[0], out, args[1][0], -1)
        if func is aten.native_layer_norm.default and 0 not in found:
            y, mean, rstd = out
            return self._affine(y, (args[0] - mean) * rstd, found.get(2), found.get(3), lambda index, y: index)
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
            ((place, weight),) = found.items()
            other = args[1 - place]
            if not isinstance(other, Tensor) or func is aten.mul_.Tensor:  # which has overwritten its data
                return False
            return self._add("scale", weight, weight.index.expand(out.shape), out, other.expand(out.shape))
        if func in SHIFTS and len(args) == 2 and len(found) == 1:
            ((place, weight),) = found.items()
            if not isinstance(args[1 - place], Tensor) or (place == 0 and _writes(func)):
                return False
            return self._shift(weight, out, sign=SHIFTS[func] if place else 1)
        if func is aten.detach.default or _writes(func):
            return False
        # A view of a weight, or a question about it that has no derivative.
        outputs = [o for o in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(o, Tensor)]
        return all(not o.is_floating_point() or self.weight(o) is not None for o in outputs)

    def _affine(self, y: Tensor, normalised: Tensor, scale: Weight | None, shift: Weight | None, along: Any) -> bool:
        """The scale and shift after a normalisation; ``along`` spreads an index over the output."""
        if scale is not None:
            self._add("scale", scale, along(scale.index, y).expand(y.shape), y, normalised)
        return shift is None or self._shift(shift, y, along(shift.index, y))

    def _lookup(self, weight: Weight, out: Tensor, rows: Tensor, padding: int) -> bool:
        self.lookups += 1
        if self.lookups in self.constant:
            key = ("rows", tuple(rows.flatten().tolist()))
            return self._copied(out, weight.copy(out, key, weight.index[rows]))
        return self._add("lookup", weight, weight.index, out, rows, (padding, self.lookups))

    def _matmul(self, out: Tensor, factors: Sequence[Tensor], left: Weight | None, right: Weight | None) -> bool:
        weight, data = (right, factors[0]) if left is None else (left, factors[1])
        if weight is None:
            return True
        if left is not None and right is not None:
            return False
        transposed = left is not None
        index = weight.index.mT if transposed else weight.index
        if data.ndim == 1 or index.ndim == 1:  # a matrix by a vector
            return not transposed and self._add("matmul", weight, index[:, None], out, data, ("vector", False))
        if index.ndim == 2:
            return self._add("matmul", weight, index, out, data, ("matrix", transposed))
        return len(weight.blocks) <= MOST_BLOCKS and all(
            self._add("matmul", weight, block.mT if transposed else block, out, data, (places, transposed))
            for block, places in weight.blocks
        )


def _writes(func: Any) -> bool:
    return func._schema.is_mutable


def _channels(per_channel: Tensor, x: Tensor) -> Tensor:
    """One number a channel, spread over a tensor whose axis 1 counts channels."""
    return per_channel.view(-1, *[1] * (x.ndim - 2)).expand(x.shape)
