"""L3D as published (Chrisman, Bushnaq and Sharkey, 2025, arXiv:2504.00194), from its description.

Two sets of low-rank rows; of a batch of 32 the largest tenth of the coefficients is kept; Adam at 1e-2, which falls to
four fifths every hundred epochs; decoder rows of unit norm. No warm-up and nothing for directions that die: that is
what :func:`eigendecomp.decompose` adds. The gradient is that of Σ (f − r)², as in the paper, or the one that its
published code computes, (2f − r)J.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.directions import Directions, Shapes
from eigendecomp.sparsity import cutoff

Reference = Literal["other", "mean", "zero"]
Gradient = Literal["paper", "code"]


@dataclass
class L3D:
    """Encoder and decoder rows, and the normalised error of the last epoch."""

    encoder: Directions
    decoder: Directions
    error: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Settings:
    """What decides a fit, as published."""

    directions: int
    rank: int = 1
    epochs: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-2
    decay: float = 0.8  # every ``decay_epochs``
    decay_epochs: int = 100
    kept: float = 0.1
    reference: Reference = "other"
    gradient: Gradient = "paper"


def cotangents(f: Float[Tensor, "n k"], r: Float[Tensor, "n k"], gradient: Gradient = "paper") -> Float[Tensor, "n k"]:
    """What is pulled back: 2 (f − r), or 2f − r as the published code has it."""
    return 2 * (f - r) if gradient == "paper" else 2 * f - r


def references(f: Float[Tensor, "n k"], kind: Reference, draw: torch.Generator) -> Float[Tensor, "n k"]:
    """The output that each sample of a batch is compared with: another's of the batch, the batch's mean, or zero."""
    if kind == "other":
        return f[torch.randint(len(f), (len(f),), generator=draw)]
    return f.mean(0).expand_as(f) if kind == "mean" else torch.zeros_like(f)


@torch.enable_grad()
def fit(
    jacobian: Float[Tensor, "n k w"], f: Float[Tensor, "n k"], shapes: Shapes, settings: Settings, *, seed: int
) -> L3D:
    """Learn directions from samples' Jacobians ∂f/∂w, over the flattened tensors of ``shapes`` in order, and outputs.

    The Jacobians are formed once, which the published code does again in every step: the seconds are the fit's alone.
    """
    clock = time.process_time()
    draw = torch.Generator().manual_seed(seed)
    encoder, decoder = (
        Directions.random(shapes, settings.directions, settings.rank, generator=draw).map(torch.nn.Parameter)
        for _ in range(2)
    )
    optimizer = torch.optim.Adam([*encoder.tensors(), *decoder.tensors()], lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, settings.decay_epochs, settings.decay)
    left = total = 0.0
    for _ in range(settings.epochs):
        left, total = 0.0, 0.0
        for batch in torch.randperm(len(f), generator=draw).split(settings.batch_size):
            c = cotangents(f[batch], references(f[batch], settings.reference, draw), settings.gradient)
            g = torch.bmm(c.unsqueeze(1), jacobian[batch]).squeeze(1)
            z = g @ encoder.flat().T
            kept = z * (z.abs() >= cutoff(z, settings.kept))
            error, size = (g - kept @ decoder.flat()).square().sum(), g.square().sum().clamp_min(1e-12)
            optimizer.zero_grad()
            (error / size).backward()
            optimizer.step()
            decoder.normalize_()
            left, total = left + error.item(), total + size.item()
        schedule.step()
    encoder, decoder = (one.map(Tensor.detach) for one in (encoder, decoder))
    return L3D(encoder, decoder, left / total, time.process_time() - clock)
