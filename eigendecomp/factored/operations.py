"""The kinds of use of a parameter, one class each: from which operations it is read, and what gradient it gives.

A new operation is a new class here: ``arguments`` names the operations and where the parameter stands among their
arguments, ``of`` reads a call, ``axes`` and ``sides`` give the two factors of a gradient that has them, ``gradient``
forms it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from eigendecomp.factored.layouts import Axes, Layout, NotUnderstood, Weight, split_axes
from eigendecomp.factored.terms import Factored, Patches, Side, Term

aten = torch.ops.aten

MOST_BLOCKS = 64  # different matrices in one batched product, as attention heads are
KINDS: dict[tuple[Any, int], type["Known"]] = {}  # by the operation and the place of the parameter in its arguments

LAYER_NORM, GROUP_NORM = aten.native_layer_norm.default, aten.native_group_norm.default
BATCH_NORMS = {aten.native_batch_norm.default: 7, aten._native_batch_norm_legit_no_training.default: 6}  # place of ε
BY_CHANNEL = {aten.convolution.default, GROUP_NORM, *BATCH_NORMS}  # whose vectors lie along axis 1 of the output


@dataclass(eq=False)
class Node:
    """The output of an operation and its place in the graph of derivatives, known when the next operation runs."""

    output: Tensor
    edge: Any = None

    @property
    def place(self) -> tuple:
        """What two nodes with one output have in common."""
        return self.edge.node, self.edge.output_nr

    def settle(self) -> Self:
        """Take the place in the graph, before anything can change the output in place."""
        if self.output.requires_grad:
            self.edge = get_gradient_edge(self.output)
        return self

    def by_sample(self, x: Tensor) -> Tensor:
        """The output, or its gradients, with what belongs to different samples along one axis."""
        return x


@dataclass
class Call:
    """An operation that was called with weights among its arguments."""

    operation: Any
    arguments: tuple
    result: Any
    weights: Mapping[int, Weight]  # by their place among the arguments
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.operation is aten.native_batch_norm.default and self.arguments[5]:
            raise ValueError("batch normalisation uses the batch's statistics; call model.eval() first")

    @property
    def output(self) -> Tensor:
        return self.result[0] if isinstance(self.result, tuple) else self.result

    def data(self, place: int) -> Tensor:
        """An argument that is no weight; raises :class:`NotUnderstood` where it is one, or a number."""
        if place in self.weights or not isinstance(self.arguments[place], Tensor):
            raise NotUnderstood(str(self.operation))
        return self.arguments[place]

    def over_output(self, per_entry: Tensor) -> Tensor:
        """A number for each entry of a weight, spread over the entries of the output that the weight meets."""
        if self.operation in BY_CHANNEL:
            per_entry = per_entry.view(-1, *[1] * (self.output.ndim - 2))
        return per_entry.expand(self.output.shape)

    def normalised(self) -> Tensor:
        """What a normalisation scales."""
        x = self.data(0)
        if self.operation in BATCH_NORMS:
            mean, variance, epsilon = *self.arguments[3:5], self.arguments[BATCH_NORMS[self.operation]]
            return (x - self.over_output(mean)) * self.over_output((variance + epsilon).rsqrt())
        _, mean, scale = self.result
        if self.operation is LAYER_NORM:
            return (x - mean) * scale
        return ((x.reshape(*mean.shape, -1) - mean.unsqueeze(-1)) * scale.unsqueeze(-1)).view(x.shape)


@dataclass(eq=False, kw_only=True)
class Use(Node, ABC):
    """One use of one parameter.

    ``index`` gives the flat position in the parameter of every entry of the weight as the operation sees it: (in, out)
    for a matrix, (vocabulary, d) for a table, the kernel's shape, or for elementwise uses the output's shape.
    """

    first_axis_alone: ClassVar[bool] = True  # whether samples can lie along the first axis of the output alone

    weight: Weight
    index: Int[Tensor, "..."]
    data: Tensor
    occurrence: tuple = ()  # which of a run's operations it is

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def signature(self) -> tuple:
        """What must be the same in every run."""
        return type(self), self.name

    def to(self, dtype: torch.dtype) -> Self:
        """The same use with its data, if they are numbers, in another precision."""
        return replace(self, data=self.data.to(dtype)) if self.data.is_floating_point() else self

    def entries(self, layout: Layout, examples: int) -> Int[Tensor, "..."]:
        """The entries of the parameter that are met; raises :class:`NotUnderstood` where each sample meets its own."""
        return self.index

    def axes(self, shape: tuple[int, ...]) -> Axes:
        """How a use with two sides splits the parameter's axes; none for a gradient that is formed."""
        return Axes()

    def growing_axes(self, fewer: "Use", examples: int) -> tuple:
        """Where samples lie in the arguments, from the same use in a run of an example less, if that must be known."""
        return ()

    def check(self, plan: "Plan", examples: int) -> None:
        """Raises :class:`NotUnderstood` if the plan does not give this use its gradient."""

    @abstractmethod
    def gradient(self, plan: "Plan", delta: Float[Tensor, "c *out"], examples: int) -> Float[Tensor, "ec w"]:
        """The formed gradient of every example and cotangent, from the output gradients of c cotangents."""


class Known(Use):
    """A use in an operation that is known by name: output = operation(data, weight)."""

    arguments: ClassVar[Mapping[Any, tuple[int, ...]]] = {}

    def __init_subclass__(cls) -> None:
        KINDS.update(
            {(operation, i): cls for operation, some in cls.__dict__.get("arguments", {}).items() for i in some}
        )

    @classmethod
    @abstractmethod
    def of(cls, call: Call, place: int) -> "Sequence[Use]":
        """The uses of the weight at this place; raises :class:`NotUnderstood`."""


@dataclass(eq=False)
class Plan:
    """How one use is read, in every batch."""

    kind: type[Use]
    signature: tuple
    weight: Weight
    layout: Layout
    shape: tuple[int, ...]  # of the parameter
    entries: Tensor  # that the use meets
    axes: Axes
    growing: tuple  # the axes of its arguments along which samples lie, if that must be known
    apart: "Plan | None" = None  # the same with positions as samples, where outputs depend on their own position alone
    numbers: float = 0.0  # held for each example and draw, about
    others: list[Weight] = field(default_factory=list)  # further tensors that were seen to hold the same entries

    @classmethod
    def of(cls, use: Use, layout: Layout, examples: int, shape: tuple[int, ...], growing: tuple) -> Self:
        """Raises :class:`NotUnderstood` where the gradient cannot be read so."""
        entries, axes = use.entries(layout, examples), use.axes(shape)
        plan = cls(type(use), use.signature, use.weight, layout, shape, entries, axes, growing)
        use.check(plan, examples)
        return plan

    def recognises(self, use: Use, examples: int) -> bool:
        """Whether a use in another run is the one that the plan was made for."""
        length = use.by_sample(use.output).shape[self.layout.axis]
        if use.signature != self.signature or length % examples:
            return False
        if use.weight is not self.weight and use.weight not in self.others:
            try:
                if not torch.equal(use.entries(self.layout, examples), self.entries):
                    return False
            except NotUnderstood:
                return False
            self.others.append(use.weight)
        return True

    @property
    def name(self) -> str:
        return self.weight.name

    @cached_property
    def in_order(self) -> bool:
        """Whether the entries are the whole parameter."""
        return torch.equal(self.entries, torch.arange(math.prod(self.shape), device=self.entries.device))

    @property
    def group(self) -> tuple:
        """Terms of one group can be joined: they have the same sides, and share the same one or none."""
        indices = tuple(map(id, self.axes.indices))
        return (
            self.axes.left,
            indices,
            self.axes.input_is_left,
            self.kind is Embedding,
            self.layout.positions is not None,
        )


# ---- uses with two sides


def shared(plan: Plan, inputs: Shaped[Tensor, "e t *i"]) -> Side:
    """The side that an example's cotangents share: what arrives at every position."""
    return Side(inputs.unsqueeze(0), *plan.axes.of(inputs=True))


class Product(Known):
    """A use whose gradient is a sum of outer products of inputs and output gradients."""

    def output_gradients(self, layout: Layout, delta: Tensor, examples: int) -> Float[Tensor, "c e t o"]:
        """What goes back to every position."""
        return layout.split(self.by_sample(delta), examples, 1)

    @abstractmethod
    def input_side(self, plan: Plan, examples: int) -> Side:
        """The inputs at every position, numbers or rows of a table: the side that an example's cotangents share."""

    def sides(self, plan: Plan, delta: Float[Tensor, "c *out"], examples: int) -> Term:
        """The two factors of the gradient."""
        outputs = Side(self.output_gradients(plan.layout, delta, examples), *plan.axes.of(inputs=False))
        inputs = self.input_side(plan, examples)
        return (inputs, outputs) if plan.axes.input_is_left else (outputs, inputs)

    def gradient(self, plan: Plan, delta: Tensor, examples: int) -> Tensor:
        factored = Factored(self.name, plan.shape, plan.axes.left, [self.sides(plan, delta, examples)])
        return factored.dense()[self.name].flatten(1)


@dataclass(eq=False, kw_only=True)
class Linear(Product):
    """data @ weight, or weight @ data where it is ``transposed``."""

    arguments: ClassVar = {
        aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2),
        aten.mv.default: (0, 1),
    }  # fmt: skip
    transposed: bool = False

    @classmethod
    def of(cls, call: Call, place: int) -> Sequence[Use]:
        places, weight = cls.arguments[call.operation], call.weights[place]
        data, first = call.data(sum(places) - place), place == places[0]
        if data.ndim == 1 or weight.index.ndim == 1:
            if first:
                raise NotUnderstood(str(call.operation))
            return [Vector(call.output, weight=weight, index=weight.index[:, None], data=data)]
        if weight.index.ndim == 2:
            index = weight.index.mT if first else weight.index
            return [Linear(call.output, weight=weight, index=index, data=data, transposed=first)]
        if len(weight.blocks) > MOST_BLOCKS:
            raise NotUnderstood("a product of very many different matrices")
        return [
            Heads(
                call.output, weight=weight, index=index.mT if first else index, data=data, transposed=first, heads=heads
            )
            for index, heads in weight.blocks
        ]

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return split_axes(self.index.mT, shape, input_rows=False)

    def by_sample(self, x: Tensor) -> Tensor:
        return x.mT if self.transposed else x

    def input_side(self, plan: Plan, examples: int) -> Side:
        return shared(plan, plan.layout.split(self.by_sample(self.data.detach()), examples))


class Vector(Linear):
    """data @ weight for a weight that is a vector."""

    def by_sample(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1)

    def input_side(self, plan: Plan, examples: int) -> Side:
        return shared(plan, plan.layout.split(self.data.detach(), examples))


@dataclass(eq=False, kw_only=True)
class Heads(Linear):
    """A batch of products with one matrix, of which there may be others in the batch, as attention's heads are."""

    heads: list[int] | None = None  # places in the batch; None for all

    def by_sample(self, x: Tensor) -> Tensor:
        x = super().by_sample(x)
        return (x if self.heads is None else x[..., self.heads, :, :]).flatten(-3, -2)


@dataclass(eq=False, kw_only=True)
class Embedding(Product):
    """Rows of a table, looked up."""

    arguments: ClassVar = {aten.embedding.default: (0,), aten.index.Tensor: (0,)}
    first_axis_alone: ClassVar[bool] = False
    padding: int = -1  # a row that gets no gradient

    @classmethod
    def of(cls, call: Call, place: int) -> Sequence[Use]:
        weight, (table, tokens, *rest) = call.weights[place], call.arguments
        if call.operation is aten.index.Tensor:
            if table.ndim != 2 or len(tokens) != 1 or tokens[0].dtype != torch.long:
                raise NotUnderstood(str(call.operation))
            tokens = tokens[0].remainder(len(table))
        elif any(rest[1:]):  # scaled by frequency, or sparse
            raise NotUnderstood(str(call.operation))
        padding = rest[0] if rest else -1
        return [cls(call.output, weight=weight, index=weight.index, data=tokens, padding=padding)]

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return split_axes(self.index.flatten(1), shape, input_rows=True)

    def input_side(self, plan: Plan, examples: int) -> Side:
        tokens = plan.layout.split(self.data, examples).flatten(1)
        return shared(plan, tokens.masked_fill(tokens == self.padding, -1))

    def output_gradients(self, layout: Layout, delta: Tensor, examples: int) -> Tensor:
        return layout.split(delta, examples, 1).flatten(2, -2)


@dataclass(eq=False, kw_only=True)
class Convolution(Product):
    """A kernel moved over its input; every patch is a term."""

    arguments: ClassVar = {aten.convolution.default: (1,)}
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @classmethod
    def of(cls, call: Call, place: int) -> Sequence[Use]:
        _, _, _, stride, padding, dilation, transposed, _, groups = call.arguments
        if transposed or groups > 1:
            raise NotUnderstood(str(call.operation))
        weight = call.weights[place]
        options = dict(stride=stride, padding=padding, dilation=dilation)
        return [cls(call.output, weight=weight, index=weight.index, data=call.data(0), **options)]

    def axes(self, shape: tuple[int, ...]) -> Axes:
        return split_axes(self.index.flatten(1), shape, input_rows=False)

    def input_side(self, plan: Plan, examples: int) -> Side:
        images = F.pad(self.data.detach(), [width for width in reversed(self.padding) for _ in range(2)])
        size, index = plan.axes.of(inputs=True)
        split = plan.layout.split(images, examples)
        patches = Patches(split, self.index.shape[2:], self.stride, self.dilation, size)
        return patches if index is None else Side(patches.values, size, index)

    def output_gradients(self, layout: Layout, delta: Tensor, examples: int) -> Tensor:
        return rearrange(layout.split(delta, examples, 1), "c e n o ... -> c e (n ...) o")


# ---- uses whose gradient is formed: it is small, or no two factors give it


class Elementwise(Known):
    """Every entry of the output meets one entry of the weight."""

    first_axis_alone: ClassVar[bool] = False

    def entries(self, layout: Layout, examples: int) -> Tensor:
        index = layout.split(self.index, examples)
        if not bool((index == index[:1]).all()):
            raise NotUnderstood("each sample uses entries of its own")
        # Axes of stride 0 are those over which the weight was spread: one entry stays.
        return index[0][tuple(slice(1) if stride == 0 else slice(None) for stride in index.stride()[1:])].flatten()

    @abstractmethod
    def times_derivative(self, delta: Tensor) -> Tensor:
        """Output gradients times the derivative of each entry of the output in its entry of the weight."""

    def gradient(self, plan: Plan, delta: Tensor, examples: int) -> Tensor:
        value = plan.layout.split(self.times_derivative(delta), examples, 1)
        index = plan.layout.split(self.index, examples)
        summed = [axis + 1 for axis in range(1, index.ndim) if index.stride(axis) == 0]
        value = rearrange(value.sum(summed) if summed else value, "c e ... -> (e c) (...)")
        if plan.in_order:
            return value
        return value.new_zeros(len(value), math.prod(plan.shape)).index_add_(-1, plan.entries, value)


class Scale(Elementwise):
    """data · weight, also after a normalisation."""

    arguments: ClassVar = {
        aten.mul.Tensor: (0, 1),
        LAYER_NORM: (2,),
        GROUP_NORM: (1,),
        **dict.fromkeys(BATCH_NORMS, (1,)),
    }

    @classmethod
    def of(cls, call: Call, place: int) -> Sequence[Use]:
        plain = call.operation is aten.mul.Tensor
        data = call.data(1 - place).expand(call.output.shape) if plain else call.normalised()
        weight = call.weights[place]
        return [cls(call.output, weight=weight, index=call.over_output(weight.index), data=data)]

    def times_derivative(self, delta: Tensor) -> Tensor:
        return delta * self.data.detach()


@dataclass(eq=False, kw_only=True)
class Bias(Elementwise):
    """data ± weight, also at the end of another operation."""

    arguments: ClassVar = {
        aten.add.Tensor: (0, 1), aten.add_.Tensor: (1,), aten.sub.Tensor: (0, 1), aten.sub_.Tensor: (1,),
        aten.addmm.default: (0,), aten.baddbmm.default: (0,), aten.convolution.default: (2,), LAYER_NORM: (3,),
        GROUP_NORM: (2,), **dict.fromkeys(BATCH_NORMS, (2,)),
    }  # fmt: skip
    sign: int = 1

    @classmethod
    def of(cls, call: Call, place: int) -> Sequence[Use]:
        weight = call.weights[place]
        if len(call.arguments) == 2:
            call.data(1 - place)
        negative = call.operation in (aten.sub.Tensor, aten.sub_.Tensor) and place == 1
        return [cls(call.output, weight=weight, index=call.over_output(weight.index), data=call.output,
                    sign=-1 if negative else 1)]  # fmt: skip

    def times_derivative(self, delta: Tensor) -> Tensor:
        return delta if self.sign == 1 else -delta
