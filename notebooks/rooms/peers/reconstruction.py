"""Components in the place of a network's weights, masked: the peers' own test of what they found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.study.chains import Stage, run
from eigendecomp.study.peers.spd import stochastic_mask
from rooms.peers import scores


@dataclass(frozen=True)
class Reconstruction:
    """Squared error of the outputs with masked components in the place of the weights, over the outputs' variance.

    Args:
        unmasked: all components count.
        important: each component counts for its importance.
        stochastic: for m = g + (1 − g) r, with r uniform in [0, 1] for every sample and component.
        adversarial: for the r that is worst, the same for all samples, as 20 signed steps of a tenth find it.
    """

    unmasked: float
    important: float
    stochastic: float
    adversarial: float


def filled(
    rows: Float[Tensor, "c w"], weights: Mapping[str, Float[Tensor, "i o"]]
) -> dict[str, Float[Tensor, "c i o"]]:
    """Directions with a length in every weight, so that their parts there add up to it as well as they can."""
    parts = scores.parts_of(rows, {name: tuple(weight.shape) for name, weight in weights.items()})
    return {name: scores.signed(block, weights[name]) for name, block in parts.items()}


def stacked(components: scores.Parts) -> dict[str, Float[Tensor, "c i o"]]:
    """Components of single weights as components of all of them: each is zero in every weight but its own."""
    total, start, padded = sum(map(len, components.values())), 0, {}
    for name, block in components.items():
        padded[name] = block.new_zeros(total, *block.shape[1:])
        padded[name][start : start + len(block)] = block
        start += len(block)
    return padded


def masked(
    stages: Sequence[Stage], components: scores.Parts, x: Float[Tensor, "n i"], mask: Float[Tensor, "n c"]
) -> Float[Tensor, "n o"]:
    """The outputs of a chain whose weights are, sample by sample, the masked sums of their components."""
    return run(stages, x, lambda stage, x: torch.einsum("nc,cio,ni->no", mask, components[stage.name], x))


@torch.no_grad()
def reconstruction(
    stages: Sequence[Stage], components: scores.Parts, x: Float[Tensor, "n i"], ci: Float[Tensor, "n c"], *, seed: int,
    draws: int = 16, steps: int = 20, step: float = 0.1,
) -> Reconstruction:  # fmt: skip
    """How well components compute what the weights do, masked by their importances ``ci`` on the samples.

    A component may have a part in several weights and has one mask for all of them. What components leave of a weight
    is left out.
    """
    whole = {stage.name: stage.weight.detach().unsqueeze(0) for stage in stages}
    y = masked(stages, whole, x, x.new_ones(len(x), 1))
    variance = (y - y.mean(0)).square().mean()
    draw = torch.Generator().manual_seed(seed)

    def error(mask: Tensor) -> Tensor:
        return (masked(stages, components, x, mask) - y).square().mean() / variance

    drawn = [error(stochastic_mask(ci, torch.rand(ci.shape, generator=draw).to(x))) for _ in range(draws)]
    r = torch.rand(ci.shape[1], generator=draw).to(x)
    for _ in range(steps):
        with torch.enable_grad():
            r.requires_grad_()
            (slope,) = torch.autograd.grad(error(stochastic_mask(ci, r)), r)
        r = (r.detach() + step * slope.sign()).clamp(0, 1)
    return Reconstruction(
        error(torch.ones_like(ci)).item(), error(ci).item(), torch.stack(drawn).mean().item(),
        error(stochastic_mask(ci, r)).item(),
    )  # fmt: skip
