"""Pairs of a class and another concept."""

import pytest
import torch

from eigendecomp.targets.fashion import pairs


def test_pairs_hold_where_both_do_and_neither_implies_the_other() -> None:
    n = 40
    first, dark, always = torch.arange(n) % 2 == 0, torch.arange(n) % 4 == 0, torch.ones(n, dtype=torch.bool)
    truth = {"choose": torch.stack([first, ~first, dark, always], 1)}
    names, held = pairs.both(["shirt", "boot", "dark", "always"], truth, 2, least=3)
    assert names == ["shirt and dark"]  # a boot is never dark, and everything is always
    assert torch.equal(held["choose"][:, 0], first & dark)


def test_a_pair_is_wanted_in_each_half_of_every_part() -> None:
    n = 40
    first = torch.arange(n) % 2 == 0
    late = first & (torch.arange(n) >= 20) | (torch.arange(n) % 8 == 1)
    truth = {"choose": torch.stack([first, late], 1)}
    with pytest.raises(ValueError, match="no pair holds for least=3"):
        pairs.both(["shirt", "late"], truth, 1, least=3)
