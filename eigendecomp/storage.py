"""Directions as tensors with names, and what a file or a checkpoint must be one of."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from eigendecomp.directions import Directions
from eigendecomp.settings import Settings
from eigendecomp.support import files, parallel
from eigendecomp.support.axes import factor_sizes
from eigendecomp.support.examples import Examples
from eigendecomp.target import Target


def pack(prefix: str, directions: Directions) -> dict[str, Tensor]:
    """The factors under names that say what they are."""
    return {
        f"{prefix}/{name}/{number}": factor
        for name, factors in directions.factors.items()
        for number, factor in enumerate(factors)
    }


def unpack(prefix: str, tensors: Mapping[str, Tensor], target: Target, settings: Settings, n: int) -> Directions:
    """The n directions that :func:`pack` took apart; ValueError if a factor has another shape than theirs."""
    factors: dict[str, list[Tensor]] = {}
    for name, shape in target.shapes.items():
        sizes = factor_sizes(shape, settings.rank, settings.factorization)
        factors[name] = [tensors[f"{prefix}/{name}/{number}"].to(target.device) for number in range(len(sizes))]
        for factor, size in zip(factors[name], sizes, strict=True):
            if factor.shape != (n, *size):
                raise ValueError(
                    f"the factors of {name!r} have shape {tuple(factor.shape)}, which fits no direction of it"
                )
    return Directions(target.shapes, settings.factorization, factors)


def fingerprint(target: Target) -> str:
    """sha256 over the names, shapes and values of the chosen parameters."""
    return files.checksum(target.chosen, "target")


def identity(target: Target, settings: Settings, seen: Examples, count: int | None) -> dict[str, Any]:
    """What a checkpoint must be a checkpoint of: the settings, the target, and ``seen`` of ``count`` examples."""
    return {
        "settings": settings.as_json(),
        "target": fingerprint(target),
        "precision": str(parallel.precision() or target.dtype),
        "data": files.checksum({str(i): tensor for i, tensor in enumerate(seen)}, f"{count} examples"),
    }
