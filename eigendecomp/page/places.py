"""Where in an image a direction acts: a sample's activation, split over the places where it arises.

With the cotangent c = S J u / a, the sum ⟨Jᵀc, u⟩ of what all places contribute is a = √(uᵀHu) itself, so no reference
is needed.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence
from eigendecomp.support.examples import Examples
from eigendecomp.support.padding import StillPadding
from eigendecomp.target import Target


def spatial_maps(
    target: Target, divergence: Divergence, u: Directions, images: Examples, y: Float[Tensor, "e k"]
) -> Float[Tensor, "e h w"] | None:
    """How much each place adds to the activations of these images: maps that add up to them; None without places.

    A module adds, at every place of its output, its output's change along u times what that change does later. Modules
    whose outputs have no places (a linear head) are left out, so what they add is missing from the sum.

    Args:
        u: one direction.
        y: J u.
    """
    with torch.enable_grad():
        calls, f = recorded(target, images)
        if not calls:
            return None
        c = curvature_times(divergence, f.detach(), y)
        c = c / (c * y).sum(-1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny).sqrt()
        back = torch.autograd.grad(f, [call.output for call in calls], c, allow_unused=True)
    maps = [(g * change(target, u, call)).sum(1) for call, g in zip(calls, back, strict=True) if g is not None]
    if not maps:
        return None
    finest = max((one.shape[1:] for one in maps), key=math.prod)
    sized = [F.interpolate(one[:, None], finest)[:, 0] * (one[0].numel() / math.prod(finest)) for one in maps]
    return torch.stack(sized).sum(0)


class Call(NamedTuple):
    """One call of a module: which chosen parameters it has, by its own names, what it was given, and its output."""

    module: nn.Module
    names: dict[str, str]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    output: Float[Tensor, "e c h w"]


def recorded(target: Target, images: Examples) -> tuple[list[Call], Float[Tensor, "e k"]]:
    """A run of the model: the calls of modules with chosen parameters and places in their output, and the outputs."""
    calls: list[Call] = []
    hooks = []
    for prefix, module in target.model.named_modules():
        full = {own: f"{prefix}.{own}" if prefix else own for own, _ in module.named_parameters(recurse=False)}
        names = {own: name for own, name in full.items() if name in target.chosen}

        def hook(module: nn.Module, given: Any, named: Any, output: Any, names: dict[str, str] = names) -> Any:
            if not isinstance(output, Tensor) or output.ndim != 4:
                return output
            calls.append(Call(module, names, given, named, output))
            return output.clone()  # what follows may write to it

        if names:
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        f = target.call(images).flatten(0, 1)
    finally:
        for handle in hooks:
            handle.remove()
    return calls, f


@torch.no_grad()
def change(target: Target, u: Directions, call: Call) -> Float[Tensor, "e c h w"]:
    """How a module's output changes along a direction, its input staying as it is."""
    values = {own: target.chosen[name].detach() for own, name in call.names.items()}
    tangents = {own: u.dense(name)[0].view_as(values[own]) for own, name in call.names.items()}

    def run(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(call.module, values, call.arguments, call.named)

    if type(call.module) is nn.Conv2d:  # linear in its parameters: as it is with the change in their place
        return run({own: torch.zeros_like(p) for own, p in call.module.named_parameters()} | tangents)
    with StillPadding():
        return torch.func.jvp(run, (values,), (tangents,))[1]


def curvature_times(divergence: Divergence, f: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """S y, as the gradient of ½‖S^½ y‖²."""
    leaf = y.detach().requires_grad_()
    return torch.autograd.grad(divergence.root(f, leaf).square().sum() / 2, leaf)[0]
