"""How often fits find what is known to be there, with the interval that a number of fits leaves open."""

import math

from jaxtyping import Bool, Float
from torch import Tensor

from eigendecomp.study.scores import fewest, largest_share

Z = 1.96  # standard errors from a mean to either end of its 95% interval


def wilson(successes: int, fits: int) -> tuple[float, float]:
    """The 95% interval of a rate that ``successes`` of ``fits`` leave open (Wilson, 1927).

    Raises:
        ValueError: if there are no fits, or more successes than fits.
    """
    if not 0 <= successes <= fits or fits < 1:
        raise ValueError(f"{successes} successes of {fits} fits are no rate")
    rate, weight = successes / fits, Z * Z / fits
    middle, half = rate + weight / 2, Z * math.sqrt(rate * (1 - rate) / fits + weight / (4 * fits))
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)


def told(successes: int, fits: int) -> dict[str, float]:
    """A rate as notebooks record it: how many of how many, the ends of its interval, and a standard error from them."""
    least, most = wilson(successes, fits)
    ends = {"least": least, "most": most, "error": (most - least) / (2 * Z)}
    return {"successes": successes, "fits": fits, "rate": successes / fits, **ends}


def in_use(used: Float[Tensor, "n v"], least: float = 0.002) -> Bool[Tensor, " v"]:
    """The units that are on in at least this share of the samples."""
    return (used != 0).double().mean(0) >= least


def by_group(used: Float[Tensor, "n v"], strength: Float[Tensor, "g p v"]) -> dict[str, int | float]:
    """How well units in use belong to single groups, such as circles, each probed at p points.

    ``live`` units, the least ``share`` of a unit's squared strength that comes from one group, and the ``units`` that
    carry 90% of a group's squared strength: their mean over groups, ``fewest units`` and ``most units``.
    """
    live = in_use(used)
    energy = strength.square().mean(1)[:, live]
    if not live.any():
        return {"live": 0, "share": 0.0, "units": 0.0, "fewest units": 0, "most units": 0}
    count = fewest(energy)
    return {
        "live": int(live.sum()),
        "share": largest_share(energy).min().item(),
        "units": count.double().mean().item(),
        "fewest units": int(count.min()),
        "most units": int(count.max()),
    }
