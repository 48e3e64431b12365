"""The loop that trains every toy: a step of the optimiser, a step of a cosine schedule."""

from collections.abc import Callable

import torch
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
