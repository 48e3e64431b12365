"""Circuits of higher rank: the network of ``circuits``, with inputs that are on or off together in groups.

A group's inputs vary freely while it is on, so that its gradients span as many dimensions as it has inputs, and yet a
sample needs one circuit a group. Chrisman, Bushnaq and Sharkey (2025), higher-rank circuits.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys import circuits, tms
from eigendecomp.targets.toys.stages import own_truth


def data(
    n: int, groups: int, size: int, generator: torch.Generator, *, active: float = 0.05
) -> Float[Tensor, "n inputs"]:
    """Groups each on with probability ``active``, their inputs then uniform in [0, 1]; no sample is empty."""
    drawn = int(n / (1 - (1 - active) ** groups) * 1.1) + 100
    on = torch.rand(drawn, groups, generator=generator) < active
    on = on[on.any(1)][:n]
    return torch.rand(len(on), groups * size, generator=generator) * on.repeat_interleave(size, 1)


def alone(groups: int, size: int, count: int, generator: torch.Generator) -> Float[Tensor, "groups count inputs"]:
    """Each group on alone, ``count`` times, its inputs drawn."""
    x = torch.rand(groups, count, groups * size, generator=generator)
    return x * torch.eye(groups).repeat_interleave(size, 1).unsqueeze(1)


def train(
    groups: int, size: int, hidden: int, *, seed: int, steps: int = 3000, learning_rate: float = 0.02
) -> tuple[tms.TMS, Float[Tensor, "inputs inputs"], float]:
    """A trained network, the A that it was taught, and the share of the outputs' variance that it explains."""
    a = circuits.coefficients(groups * size, seed)
    draw = lambda n, generator: data(n, groups, size, generator)  # noqa: E731
    model, share = circuits.taught(draw, a, hidden, seed, steps, learning_rate)
    return model, a, share


def truth(model: tms.TMS, groups: int) -> Truth:
    """For every group the parameter-space object that computes it on its mean input.

    The gradient of half the squared length of what the group adds to the outputs, every input of it at ½.
    """
    x = 0.5 * torch.eye(groups).repeat_interleave(len(model.W_in) // groups, 1)
    return own_truth(model, x.unsqueeze(1), (x @ circuits.reach(model)).unsqueeze(1))
