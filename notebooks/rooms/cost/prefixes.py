"""What captures of a causal model take with and without runs on prefixes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eigendecomp.factored.source import CapturedSource
from eigendecomp.target import Target
from rooms.cost.benchmark import costs


def ones(f: Tensor) -> Tensor:
    """Cotangents that are one for every output, one draw for each position."""
    return torch.ones_like(f).unsqueeze(2)


def captures(
    model: nn.Module, examples: Sequence[Tensor], parameters: Sequence[str] = ("*",), repeats: int = 5
) -> dict[str, Any]:
    """Median CPU seconds and peak bytes of one capture of a batch, over whole sequences and with prefixes.

    Returns ``{"whole": {"seconds", "bytes"}, "prefixes": {…}, "ends": where the chosen prefixes end}``. Both ways are
    timed in turn in one process. Where one prefix is chosen, the whole sequence, both ways are the same.

    Raises:
        ValueError: if the model is not found to be causal.
    """
    source = CapturedSource(Target(model.eval(), parameters), examples, budget=1 << 50)
    prefixes = source.prefixes
    if prefixes is None:
        raise ValueError("the model's outputs on prefixes of these inputs are not those on the whole: not causal")

    def run(way: str) -> None:
        source.prefixes = prefixes if way == "prefixes" else None
        source.gradients(examples, ones)

    took, peaks = costs({way: (lambda way=way: run(way)) for way in ("whole", "prefixes")}, repeats)
    measured = {way: {"seconds": took[way], "bytes": peaks[way]} for way in took}
    return {**measured, "ends": [*prefixes.ends(len(examples[0]), 1), source.outputs[0]]}
