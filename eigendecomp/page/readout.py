"""The last layer of a model where it is a matrix: outputs f = W h + b of fewer features h.

What a direction does to 2,048 logits is then W times what it does to 64 features, and what the page asks of the first
follows from the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.divergence import Divergence
from eigendecomp.support.examples import Examples
from eigendecomp.support.models import standard
from eigendecomp.target import Target

ROUNDING = 1e-4  # by which outputs may differ from W h + b, over the largest output


class Reached(Exception):
    """A run has come to the layer at which it stops."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class Before(Target):
    """A target that stops before a layer: its outputs are what the layer is given."""

    def __init__(self, target: Target, layer: nn.Module) -> None:
        self.__dict__.update(target.__dict__)
        self.layer = layer

    def _run(self, examples: Sequence[Tensor], chosen: dict[str, Tensor] | None) -> object:
        def stop(module: nn.Module, given: tuple[Any, ...]) -> None:
            raise Reached(given[0])

        hook = self.layer.register_forward_pre_hook(stop)
        try:
            super()._run(examples, chosen)
        except Reached as reached:
            return reached.features
        finally:
            hook.remove()
        raise RuntimeError("the model did not come to its last layer on these examples")


@dataclass
class Readout:
    """A target in two parts: features, and the matrix and bias that make outputs of them.

    Without a last layer of this kind the features are the outputs themselves, and ``weight`` is None.
    """

    before: Target
    weight: Float[Tensor, "h k"] | None = None
    bias: Float[Tensor, " k"] | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, target: Target, examples: Examples) -> Self:
        """Look for it in a run of a few examples."""
        calls: list[tuple[nn.Module, Any, Any]] = []
        keep = lambda *call: calls.append(call)  # noqa: E731
        hooks = [module.register_forward_hook(keep) for module in target.model.modules()]
        try:
            f = target.call(examples)
        finally:
            for hook in hooks:
                hook.remove()
        chosen = {p.data_ptr() for p in target.chosen.values()}
        for layer, given, output in calls:
            once = sum(one is layer for one, _, _ in calls) == 1
            if not once or any(p.data_ptr() in chosen for p in layer.parameters()):
                continue
            if parts := affine(layer, given, output, f):
                return cls(Before(target, layer), *parts)
        return cls(target)

    def __call__(self, features: Float[Tensor, "... h"]) -> Float[Tensor, "... k"]:
        """Outputs."""
        return features if self.weight is None or self.bias is None else features @ self.weight + self.bias

    def along(self, change: Float[Tensor, "... h"]) -> Float[Tensor, "... k"]:
        """The change of outputs for a change of features."""
        return change if self.weight is None else change @ self.weight

    def back(self, c: Float[Tensor, "n m k"]) -> Float[Tensor, "n m h"]:
        """Cotangents of features from those of outputs."""
        return c if self.weight is None else c @ self.weight.T

    def pair(
        self, divergence: Divergence, f: Float[Tensor, "n k"], change: Float[Tensor, "n v h"]
    ) -> tuple[Float[Tensor, "n v j"], Float[Tensor, "n v j"]]:
        """Vectors a and b in double precision with ⟨a_v, b_w⟩ = y_vᵀ S y_w, y being the changes of outputs."""
        if self.weight is None:
            root = divergence.root(f.unsqueeze(1), change).double()
            return root, root
        rows, change = divergence.root(f.unsqueeze(1), self.weight.expand(len(f), -1, -1)), change.double()
        return change @ (rows @ rows.mT).double(), change


def affine(layer: nn.Module, given: Any, output: Any, f: Float[Tensor, "e p k"]) -> tuple[Tensor, Tensor] | None:
    """Matrix and bias of a layer that makes these outputs of fewer features; None for any other."""
    if len(given) != 1 or not all(isinstance(x, Tensor) and x.ndim > 1 for x in (given[0], output)):
        return None
    h = given[0]
    if not h.is_floating_point() or h.shape[:-1] != output.shape[:-1] or h.shape[-1] >= output.shape[-1]:
        return None
    if not torch.equal(standard(output).to(f.dtype), f):
        return None
    unit = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).view(*[1] * (h.ndim - 2), h.shape[-1], -1)
    try:
        bias = layer(torch.zeros_like(unit)).flatten(0, -2)[0]
        weight = layer(unit).flatten(0, -2) - bias
    except (RuntimeError, ValueError, IndexError, AssertionError):  # it takes no other number of positions
        return None
    if (h @ weight + bias - output).abs().max() > ROUNDING * output.abs().max():
        return None
    return weight, bias
