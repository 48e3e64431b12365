"""Checks of plain values, so that every wrong one is refused in the same words."""

import math
from typing import Any


def whole(name: str, value: Any, least: int = 1, most: int = 2**31 - 1) -> int:
    """The value, if it is a whole number in range; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={value!r} must be a whole number from {least} to {most}")
    return value


def real(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> float:
    """The value, if it is a finite number in range; ValueError otherwise."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (good and above < value and least <= value <= most):
        bounds = [f"above {above:g}"] * (above > -math.inf) + [f"at least {least:g}"] * (least > -math.inf)
        bounds += [f"at most {most:g}"] * (most < math.inf)
        raise ValueError(f"{name}={value!r} must be a finite number {' and '.join(bounds)}".rstrip())
    return value
