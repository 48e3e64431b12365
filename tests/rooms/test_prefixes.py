"""Captures are measured both ways."""

import pytest
import torch
from torch import nn

from rooms.cost.prefixes import captures
from rooms.cost.sizes import Transformer


def test_captures_are_measured_with_and_without_prefixes() -> None:
    torch.manual_seed(0)
    found = captures(Transformer(7, 8, 2, 1, 96), (torch.randint(7, (2, 96)),), ["attention*"], repeats=1)
    assert found["ends"][-1] == 96
    for way in ("whole", "prefixes"):
        assert found[way]["seconds"] > 0 and found[way]["bytes"] > 96**2 * 8 * 4


def test_models_that_are_not_causal_are_not_measured() -> None:
    with pytest.raises(ValueError, match="not causal"):
        captures(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), (torch.randn(2, 8, 4),), repeats=1)
