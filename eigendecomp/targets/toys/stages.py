"""What computes a given part of the output of a network that is a chain of weights."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.study.chains import Stage
from eigendecomp.study.recovery import Truth


def own_truth(
    model: nn.Module, inputs: Float[Tensor, "features count i"], cotangents: Float[Tensor, "features count o"]
) -> Truth:
    """For every feature Jᵀc summed over its inputs, where it is on alone; every weight of the chain is a layer."""
    count = inputs.shape[1]
    objects = own_gradients(model, inputs.flatten(0, 1), cotangents.flatten(0, 1), count)
    stages: list[Stage] = model.stages()  # type: ignore[operator]
    shown = torch.eye(len(inputs), dtype=torch.bool).repeat_interleave(count, 1)
    return Truth(inputs.flatten(0, 1), objects, {stage.name: (stage.name,) for stage in stages}, samples=shown)


def own_gradients(
    model: nn.Module, x: Float[Tensor, "m i"], cotangents: Float[Tensor, "m o"], count: int = 1
) -> dict[str, Float[Tensor, "_ *shape"]]:
    """Jᵀc at each input, as {parameter: (inputs / count, *shape)}: the sum over every ``count`` inputs that follow."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(row: Tensor, c: Tensor) -> dict[str, Tensor]:
        def weighed(w: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, w, (row[None],))[0] @ c

        return torch.func.grad(weighed)(weights)

    gradients = torch.func.vmap(one)(x, cotangents)
    return {name: g.unflatten(0, (-1, count)).sum(1) for name, g in gradients.items()}
