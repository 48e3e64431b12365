"""The loop that trains every toy, a step of the optimiser and a step of a cosine schedule, and how well it did."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def minimise(
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    after: Callable[[], object] | None = None,
) -> None:
    """Minimise ``loss(step)``; the learning rate falls as a cosine, and ``after`` ends each step, without a graph."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
        if after is not None:
            with torch.no_grad():
                after()


def explained(y: Float[Tensor, "n k"], wanted: Float[Tensor, "n k"]) -> float:
    """The share of the wanted outputs' variance that a network's outputs explain."""
    return 1 - ((y - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()
