"""J u of many directions, from one run of the model that is taken apart into its linear steps.

A change passes through a run as a product with matrices and, between them, as a product entry by entry. What lies
between two matrices, an activation function of ten operations say, is computed once as one factor and then costs every
direction one multiplication. ``torch.func.jvp`` does each of the ten for each direction.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from eigendecomp.curvature import push_forward
from eigendecomp.directions import Directions
from eigendecomp.divergence import SquaredError
from eigendecomp.support.algebra import sum_of
from eigendecomp.support.examples import Examples, chunks
from eigendecomp.target import Target

log = logging.getLogger(__name__)
CACHE = 3 << 20  # bytes of an array that the processor's cache holds: a change of a few directions
aten: Any = torch.ops.aten
INSTEAD = dict.fromkeys((aten.view.default, aten._unsafe_view.default), aten.reshape.default)  # strides may be others
LINEAR = set(["reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "clone"])
LINEAR |= set(["_to_copy", "sum", "mean", "mm", "bmm"])  # in each argument, the others held

Step = Callable[[list[Tensor]], list[Tensor]]


class Recorder(TorchDispatchMode):
    """The operations that depend on some tensors: functions of their flattened arguments, these, and the outputs."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        super().__init__()
        self.moving = WeakIdKeyDictionary(dict.fromkeys(sources, True))
        self.calls: list[tuple[Any, Callable[..., Any], list[Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        out, (flat, layout) = func(*args, **kwargs), tree_flatten(args)
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor) and one.is_floating_point()]
        shaped = name.endswith("_like") or name.startswith("new_")  # like a tensor in shape alone
        given = [one for one in [*flat, *tree_leaves(kwargs)] if isinstance(one, Tensor) and one in self.moving]
        if shaped or not made or not given:
            return out
        if func._schema.is_mutable or func is aten.detach.default or not any(one is given[-1] for one in flat):
            raise RuntimeError(f"{func} is not followed")
        self.moving.update(dict.fromkeys(made, True))
        if func is aten.addmm.default and not kwargs:  # a product and a sum, so that the product is linear
            product = out - flat[0]
            self.calls.append((aten.mm.default, aten.mm.default, flat[1:], [product]))
            self.calls.append((aten.add.Tensor, aten.add.Tensor, [flat[0], product], made))
            return out
        func = INSTEAD.get(func, func)
        nested = any(isinstance(one, (list, tuple)) for one in args)
        call = (lambda *flat: func(*tree_unflatten(flat, layout), **kwargs)) if nested else partial(func, **kwargs)
        self.calls.append((func, call, flat, made))
        return out


class Along:
    """The derivative of a target's outputs with respect to its chosen parameters, for the examples given.

    A change of a tensor is a change that some step has made, its slot, times a factor: a number or a tensor.
    """

    def __init__(self, target: Target, examples: Examples) -> None:
        chosen = {name: value.detach() for name, value in target.chosen.items()}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Recorder(list(chosen.values())) as recorder:
            self.outputs = target.call(examples, chosen)
        self.shapes = [value.shape for value in chosen.values()]  # of slots
        self.steps: list[tuple[Step, Sequence[int]]] = []  # and the slots that each reads
        self.change: dict[int, tuple[int, Any]] = {id(value): (i, 1.0) for i, value in enumerate(chosen.values())}
        for func, call, flat, made in recorder.calls:
            moving = [i for i, one in enumerate(flat) if isinstance(one, Tensor) and id(one) in self.change]
            if torch.Tag.pointwise in func.tags and len(made) == 1:
                self._factor(call, flat, moving, made[0])
            else:
                self._step(call, flat, moving, made, func.overloadpacket.__name__ in LINEAR)
        self.end = self._slot(self.outputs)
        self.bytes = sum(one.nbytes for *_, made in recorder.calls for one in made)
        read = {slot: number for number, (_, slots) in enumerate(self.steps) for slot in slots}
        read[self.end] = len(self.steps)
        self.free = [[slot for slot in slots if read[slot] == number] for number, (_, slots) in enumerate(self.steps)]

    def __call__(self, *changes: Tensor) -> Tensor:
        """The change of the outputs for one of each parameter, in their order."""
        slots: list[Any] = [*changes]
        for (step, _), done in zip(self.steps, self.free, strict=True):
            slots.extend(step(slots))
            for slot in done:
                slots[slot] = None
        return slots[self.end]

    def of(self, u: Directions) -> Float[Tensor, "n v k"]:
        """J u, of a few directions at a time."""
        e, p, k = self.outputs.shape
        y = self.outputs.new_empty(e * p, u.n, k)
        largest = max(math.prod(shape) for shape in self.shapes) * y.element_size()
        for some in torch.arange(u.n).split(max(1, CACHE // largest)):
            few = u.select(some)
            tangents = [few.dense(name).view(-1, *shape) for name, shape in zip(u.shapes, self.shapes)]
            y[:, some] = torch.func.vmap(self)(*tangents).flatten(1, 2).transpose(0, 1)
        return y

    def _add(self, step: Step, reads: Sequence[int], made: Sequence[Tensor]) -> None:
        for one in made:
            self.change[id(one)] = len(self.shapes), 1.0
            self.shapes.append(one.shape)
        self.steps.append((step, reads))

    def _factor(self, call: Callable[..., Any], flat: Sequence[Any], moving: Sequence[int], made: Tensor) -> None:
        """An operation entry by entry."""
        factors: dict[int, Any] = {}
        for i in moving:
            slot, factor = self.change[id(flat[i])]
            alone = lambda x, i=i: call(*flat[:i], x, *flat[i + 1 :])  # noqa: E731
            factor = factor * torch.func.jvp(alone, (flat[i],), (torch.ones_like(flat[i]),))[1]
            factors[slot] = factors[slot] + factor if slot in factors else factor
        terms = [(slot, plain(factor, self.shapes[slot])) for slot, factor in factors.items()]
        if len(terms) == 1:
            self.change[id(made)] = terms[0]
        else:
            self._add(lambda slots: [total(slots, terms)], [slot for slot, _ in terms], [made])

    def _slot(self, one: Tensor) -> int:
        """Where the change of a tensor is, made if it is another's times a factor."""
        slot, factor = self.change[id(one)]
        if isinstance(factor, Tensor) or factor != 1:
            self._add(lambda slots: [slots[slot] * factor], [slot], [one])
        return self.change[id(one)][0]

    def _step(
        self, call: Callable[..., Any], flat: Sequence[Any], moving: Sequence[int], made: Sequence[Tensor], linear: bool
    ) -> None:
        """Any other operation; ``linear`` in each of its arguments, or else differentiated again for every change."""
        reads = [self._slot(flat[i]) for i in moving]

        def put(*some: Tensor) -> Any:
            given = list(flat)
            for i, one in zip(moving, some, strict=True):
                given[i] = one
            return call(*given)

        def step(slots: list[Tensor]) -> list[Tensor]:
            some = [slots[slot] for slot in reads]
            if linear:
                return [sum_of([call(*flat[:i], x, *flat[i + 1 :]) for i, x in zip(moving, some, strict=True)])]
            return tree_leaves(torch.func.jvp(put, tuple(flat[i] for i in moving), tuple(some))[1])

        self._add(step, reads, made)


def plain(factor: Tensor, shape: torch.Size) -> Tensor | float:
    """A number, where all entries of a factor of this shape are one."""
    if factor.shape == shape and factor.numel() and bool((factor == factor.flatten()[0]).all()):
        return float(factor.flatten()[0])
    return factor


def total(slots: Sequence[Tensor], terms: Sequence[tuple[int, Any]]) -> Tensor:
    """The sum of slots times their factors."""
    (slot, factor), *others = terms
    sum_ = slots[slot] if isinstance(factor, float) and factor == 1 else slots[slot] * factor
    for slot, factor in others:
        if isinstance(factor, float):
            sum_ = torch.add(sum_, slots[slot], alpha=factor)
        else:
            sum_ = torch.addcmul(sum_, slots[slot], factor)
    return sum_


@torch.no_grad()
def outputs_along(
    target: Target, u: Directions, examples: Examples, most: int, memory: int
) -> Iterator[tuple[Float[Tensor, "n k"], Float[Tensor, "n v k"]]]:
    """The outputs f of all samples, and J u, ``most`` examples at a time and as many as fit into so many bytes.

    By ``torch.func.jvp`` where a run cannot be taken apart, or what came of it would differ.
    """
    first, few, square = tuple(tensor[:1] for tensor in examples), u.select([0]), SquaredError()
    true, apart = push_forward(target, square, few, first) / 2**0.5, True  # S = 2I
    try:
        one = Along(target, first)
        apart = bool((one.of(few) - true).abs().max() <= 1e-3 * true.abs().max())
        most = max(1, min(most, memory // (2 * one.bytes)))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError) as error:
        log.info("the model is differentiated as a whole: %s", error)
        apart = False
    for some in chunks(examples, most):
        if apart:
            along = Along(target, some)
            yield along.outputs.flatten(0, 1), along.of(u)
        else:
            yield target.outputs(some).flatten(0, 1), push_forward(target, square, u, some) / 2**0.5
