"""Pairs of concepts: a class and something else that hold of an image at once, such as a dark trouser.

A unit that knows classes alone, as a logit does, cannot tell them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

Share = tuple[float, float]


def both(
    names: Sequence[str],
    truth: dict[str, Bool[Tensor, "n m"]],
    classes: int,
    *,
    least: int,
    share: Share = (0.2, 0.8),
) -> tuple[list[str], dict[str, Bool[Tensor, "n p"]]]:
    """Each of the first ``classes`` concepts with each of the others, by part: names "a and b", and where both hold.

    Kept are pairs that hold for ``least`` samples in each half of every part, and for a ``share`` of the class in every
    part, so that the class does not imply the other concept or exclude it.

    Raises:
        ValueError: if no pair is kept.
    """
    together = {split: table[:, :classes, None] & table[:, None, classes:] for split, table in truth.items()}
    keep = torch.ones(classes, len(names) - classes, dtype=torch.bool)
    for split, held in together.items():
        halves = torch.stack([half.sum(0) for half in held.tensor_split(2)])
        of_class = held.double().mean(0) / truth[split][:, :classes].double().mean(0).clamp_min(1e-9).unsqueeze(1)
        keep &= (halves >= least).all(0) & (of_class >= share[0]) & (of_class <= share[1])
    if not keep.any():
        raise ValueError(f"no pair holds for least={least} samples in each half; give a smaller least, or more samples")
    which = keep.nonzero().tolist()
    return (
        [f"{names[a]} and {names[classes + b]}" for a, b in which],
        {split: held[:, keep] for split, held in together.items()},
    )
