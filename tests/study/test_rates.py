"""Rates with their intervals, and units that belong to groups."""

import pytest
import torch

from eigendecomp.study import rates


@pytest.mark.parametrize("successes, fits, least, most", [
    (58, 60, 0.8864, 0.9908), (60, 60, 0.9398, 1.0), (0, 20, 0.0, 0.1611), (5, 5, 0.5655, 1.0), (1, 2, 0.0945, 0.9055),
])  # fmt: skip
def test_wilsons_interval(successes: int, fits: int, least: float, most: float) -> None:
    assert rates.wilson(successes, fits) == pytest.approx((least, most), abs=1e-4)
    told = rates.told(successes, fits)
    assert told["rate"] == successes / fits and told["error"] == pytest.approx((most - least) / 3.92, abs=1e-4)


@pytest.mark.parametrize("successes, fits", [(1, 0), (3, 2), (-1, 2)])
def test_what_is_no_rate_is_refused(successes: int, fits: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {fits} fits"):
        rates.wilson(successes, fits)


def test_units_in_use_are_counted_by_group() -> None:
    """Two groups: the first has two units, the second one, a fourth unit is shared, and a fifth is never on."""
    strength = torch.zeros(2, 4, 5)
    strength[0, :2, 0], strength[0, 2:, 1], strength[1, :, 2] = 1.0, 1.0, 1.0
    strength[:, :, 3], strength[:, :, 4] = torch.tensor([[0.1], [0.2]]), 9.0
    used = torch.ones(1000, 5)
    used[:, 4] = 0
    found = rates.by_group(used, strength)
    assert found == {"live": 4, "share": pytest.approx(0.8), "units": 1.5, "fewest units": 1, "most units": 2}
    used[2:, 3] = 0  # on in 0.2% of the samples, and then in fewer
    assert rates.by_group(used, strength)["live"] == 4
    used[1, 3] = 0
    assert rates.by_group(used, strength)["share"] == 1.0
    assert rates.by_group(used * 0, strength)["live"] == 0
