"""Checks of plain values, so that every wrong one is refused in the same words."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
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


def finite(f: Tensor) -> Tensor:
    """A model's outputs, if they are finite; ValueError otherwise."""
    if not f.isfinite().all():
        raise ValueError("the model's output is not finite for some of the inputs; remove or mend those examples")
    return f


def usable(jacobian: Float[Tensor, "n k w"], remedy: str) -> Float[Tensor, "n k w"]:
    """Gradients of n samples, if they are finite and not all zero; ValueError, in the latter case with the remedy."""
    if not jacobian.isfinite().all():
        bad = ~jacobian.isfinite().flatten(1).all(1)
        raise ValueError(
            f"the gradient is NaN or infinite for {int(bad.sum())} of {len(bad)} samples, first for sample "
            f"{int(bad.nonzero()[0])}; remove those examples, or smooth the model where it has no slope"
        )
    if not jacobian.any():
        raise ValueError(f"all gradients are zero: {remedy}")
    return jacobian


def check_settings(settings: Any, **kinds: type) -> None:
    """ValueError if a field of the settings is out of range, or one of those named is of another kind."""
    for name in ("n_directions", "rank", "steps", "batch_size", "restarts"):
        whole(name, getattr(settings, name))
    whole("seed", settings.seed, 0)
    real("learning_rate", settings.learning_rate, above=0)
    if settings.interference is not None:
        real("interference", settings.interference, least=0)
    if settings.prune is not None:
        real("prune (share of the squared gradients)", settings.prune, above=0, most=1)
    choice("factorization", settings.factorization, "cp", "tucker")
    choice("start", settings.start, "random", "samples")
    choice("samples", settings.samples, "outputs", "uses")
    if settings.scale not in (None, "unit") or (settings.scale and settings.samples == "outputs"):
        raise ValueError(f"scale={settings.scale!r} must be None, or 'unit' with samples='uses'")
    if not isinstance(settings.tied, bool):
        raise ValueError(f"tied={settings.tied!r} must be True or False")
    for name, kind in kinds.items():
        value = getattr(settings, name)
        if not isinstance(value, kind):
            raise ValueError(f"{name}={value!r} must be a {kind.__name__}, such as those in eigendecomp")


def check_differs(
    draws: Any, pieces: Iterable[Float[Tensor, "e p k"]], generator: torch.Generator, remedy: str
) -> None:
    """Refuse references from which no output differs by more than rounding: a fit would learn the rounding.

    Raises:
        ValueError: if every cotangent is zero within 16 units of the outputs' last digit; it ends with the remedy.
    """
    for f in pieces:
        scale = f.abs().amax() + draws.divergence.predict(f).abs().amax()
        if draws.again((f.shape[0], f.shape[1]), 1, generator)(f).abs().amax() > 16 * torch.finfo(f.dtype).eps * scale:
            return
    raise ValueError(f"all gradients are zero: {remedy}")
