"""Checks of plain values, so that every wrong one is refused in the same words."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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


def patterns(parameters: object) -> tuple[str, ...]:
    """The patterns as a tuple; ValueError if they are not a sequence of strings."""
    several = (parameters,) if isinstance(parameters, str) else parameters
    if not isinstance(several, Sequence) or not all(isinstance(pattern, str) for pattern in several):
        raise ValueError(f"parameters={parameters!r} must be a list of glob patterns, such as ['*'] for all")
    return tuple(several)


def choice(name: str, value: object, *allowed: object) -> None:
    """ValueError if the value is none of those that are allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, allowed))}")


def one_output(c: Any) -> Any:
    """A number, or a list of real numbers, that every output is compared with; ValueError for anything else."""
    c = c.tolist() if isinstance(c, Tensor) else c
    try:
        values = torch.as_tensor(c)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"Constant({c!r}) must be a number or a list of numbers") from None
    if not torch.is_floating_point(values) and values.ndim > 0:
        raise ValueError(
            f"Constant({c}) holds whole numbers, which look like class labels; give one real number an "
            "output (probabilities for KLDivergence, e.g. a float one-hot row)"
        )
    if not values.double().isfinite().all():
        raise ValueError(f"Constant({c}) must be finite")
    return c
