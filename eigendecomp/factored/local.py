"""What no kind of use knows: the vector–Jacobian product of one operation alone, instead of the whole model's.

Where the operation's output belongs to samples, each one's output gradient is pulled back through the operation on the
sample's own arguments (:class:`Local`). Where all samples share the output, as they share weights that are normalised
or masked before they are used, it is read as a parameter, and its gradients are pulled back to those that it is made of
(:func:`through`).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from eigendecomp.factored.layouts import Layout, NotUnderstood, Weight
from eigendecomp.factored.operations import Call, Node, Plan, Use
from eigendecomp.gradients import Part

if TYPE_CHECKING:
    from eigendecomp.factored.record import Recorder, Trace

CLOSE = 1e-4  # relative rounding that an operation on one sample may have


@dataclass(eq=False, kw_only=True)
class Local(Use):
    """Any operation whose output belongs to samples, with all places of one parameter among its arguments."""

    first_axis_alone: ClassVar[bool] = False
    operation: Any
    leaves: list[Any]  # its arguments, flattened
    spec: TreeSpec
    own: list[int]  # the parameter's places among them

    @classmethod
    def of(cls, call: Call, name: str, weight_of: Callable[[Any], Weight | None]) -> Self:
        """Raises :class:`NotUnderstood` where the operation writes to an argument, or gives no tensor of its own."""
        leaves, spec = tree_flatten((call.arguments, dict(call.keywords)))
        own = {i: w for i, leaf in enumerate(leaves) if (w := weight_of(leaf)) is not None and w.name == name}
        out, weights = call.output, list(own.values())
        fresh = (
            isinstance(out, Tensor)
            and out.is_floating_point()
            and not any(
                isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
                for leaf in leaves
            )
        )
        if not fresh or call.operation._schema.is_mutable or any(weight.partial for weight in weights):
            raise NotUnderstood(str(call.operation))
        index = torch.cat([weight.index.flatten() for weight in weights])
        return cls(
            out, weight=weights[0], index=index, data=out, operation=call.operation, leaves=leaves, spec=spec,
            own=list(own),
        )  # fmt: skip

    @property
    def signature(self) -> tuple:
        return *super().signature, self.operation, tuple(self.own), len(self.leaves)

    def growing_axes(self, fewer: Use, examples: int) -> tuple[int | None, ...]:
        """The axis of every argument that grows with the examples, 0 for a number that does."""
        assert isinstance(fewer, Local)
        growing: list[int | None] = []
        for i, (a, b) in enumerate(zip(self.leaves, fewer.leaves, strict=True)):
            pairs = list(zip(a.shape, b.shape)) if isinstance(a, Tensor) else [] if a == b else [(a, b)]
            axes = [axis for axis, (n, less) in enumerate(pairs) if n != less]
            known = len(axes) < 2 and all(isinstance(n, int) and n * (examples - 1) == pairs[axis][1] * examples
                                          for axis in axes for n in pairs[axis][:1])  # fmt: skip
            if not known or (i in self.own and axes and a.stride(axes[0])):  # a weight for each sample
                raise NotUnderstood(str(self.operation))
            growing.append(axes[0] if axes else None)
        return tuple(growing)

    def check(self, plan: Plan, examples: int) -> None:
        """Raises :class:`NotUnderstood` if the operation on one sample gives another output, or torch cannot."""
        try:
            outputs = self._pull(plan, torch.zeros_like(self.output).expand(2, *self.output.shape), examples)[1]
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise NotUnderstood(str(self.operation)) from error
        truth = Layout(plan.layout.axis, plan.layout.major).split(self.output.detach(), examples)
        if outputs.shape != truth.shape or not (outputs - truth).norm() <= CLOSE * truth.norm():
            raise NotUnderstood(str(self.operation))

    def gradient(self, plan: Plan, delta: Tensor, examples: int) -> Tensor:
        value = self._pull(plan, delta.to(self.output.dtype), examples)[0].to(delta.dtype)
        if plan.in_order:
            return value
        return value.new_zeros(len(value), math.prod(plan.shape)).index_add_(1, plan.entries, value)

    def _pull(
        self, plan: Plan, delta: Float[Tensor, "c *out"], examples: int
    ) -> tuple[Float[Tensor, "ec w"], Float[Tensor, "e *out"]]:
        """The gradient in the entries that are met, of every sample and cotangent, and every example's output."""
        layout, positions = Layout(plan.layout.axis, plan.layout.major), plan.layout.positions
        given = layout.split(delta, examples, 1)
        if positions is not None:  # an example's output gradient, at one position alone
            at = 2 if given.shape[2] % positions == 0 else 3
            own = torch.eye(positions, dtype=given.dtype, device=given.device)
            own = own.repeat_interleave(given.shape[at] // positions, 1).flatten()
            given = torch.einsum("pl,ce...l->pce...l", own.view(positions, -1), given.movedim(at, -1))
            given = given.movedim(-1, at + 1).flatten(0, 1)
        plain = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        grow = {i: axis for i, axis in enumerate(plan.growing) if axis is not None}
        data = [i for i in grow if isinstance(plain[i], Tensor) and i not in self.own]
        weights = [plain[i][tuple(slice(None if stride else 1) for stride in plain[i].stride())] for i in self.own]

        def one(c: Tensor, *inputs: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            def run(*values: Tensor) -> Tensor:
                leaves = [leaf // examples if i in grow and isinstance(leaf, int) else leaf
                          for i, leaf in enumerate(plain)]  # fmt: skip
                for i, x in zip(data, inputs, strict=True):
                    leaves[i] = x
                for i, value in zip(self.own, values, strict=True):
                    sizes = [n // examples if grow.get(i) == axis else n for axis, n in enumerate(plain[i].shape)]
                    leaves[i] = value.expand(sizes)
                args, kwargs = tree_unflatten(leaves, self.spec)
                result = self.operation(*args, **kwargs)
                return result[0] if isinstance(result, tuple) else result

            output, back = torch.func.vjp(run, *weights)[:2]
            return back(c), output

        split = [Layout(grow[i], layout.major).split(plain[i], examples) for i in data]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says which operations it takes one by one
            pulled, outputs = torch.func.vmap(torch.func.vmap(one), (0, *[None] * len(split)))(given, *split)
        return torch.cat([g.flatten(2) for g in pulled], 2).transpose(0, 1).flatten(0, 1), outputs[0]


def through(recorder: "Recorder", trace: "Trace", gradients: dict[str, Part | Float[Tensor, "n w"]]) -> None:
    """Pull the gradients of outputs that are read as parameters back to the parameters that they are made of."""
    for name, (node, roots) in trace.derived.items():
        if name not in gradients:
            continue
        if node.edge is None:  # made without gradient
            del gradients[name]
            continue
        leaves = [Node(recorder.target.chosen[root]).settle() for root in roots]
        c = numbers(gradients.pop(name)).to(node.output.dtype).view(-1, *node.output.shape)
        for root, g in zip(roots, recorder.pull(node, leaves, c), strict=True):
            gradients[root] = g.flatten(1) + (numbers(gradients[root]) if root in gradients else 0)


def numbers(part: Part | Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
    """A parameter's gradients as numbers."""
    return part if isinstance(part, Tensor) else part.dense()[part.names[0]].flatten(1)
