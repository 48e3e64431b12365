"""Axes named as einops names them, and shapes some of whose axes go together."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from einops import EinopsError
from einops.parsing import ParsedExpression

Factorization = Literal["cp", "tucker"]
Shapes = Mapping[str, tuple[int, ...]]


class Grouped(tuple[int, ...]):
    """A tensor's shape some of whose axes share one factor: rank one of (head, d_model, d_head) may mean a matrix's."""

    groups: tuple[tuple[int, ...], ...]  # the axes of every factor

    @classmethod
    def of(cls, shape: Sequence[int], groups: Sequence[Sequence[int]]) -> "Grouped":
        made = cls(shape)
        made.groups = tuple(tuple(group) for group in groups)
        return made


def grouped(shapes: Shapes, group: Mapping[str, str] | None) -> dict[str, tuple[int, ...]]:
    """The shapes, those whose names a pattern of ``group`` matches with axes grouped as it says.

    Raises:
        ValueError: if a pattern matches no tensor, or its text does not name each axis of one on both sides.
    """
    result = dict(shapes)
    for pattern, text in (group or {}).items():
        names = [name for name in shapes if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"group={pattern!r} matches none of the chosen parameters {list(shapes)}")
        for name in names:
            result[name] = Grouped.of(shapes[name], axes_in(text, len(shapes[name]), name))
    return result


def groups_of(shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The axes of every factor of a tensor: one each, if nothing else is said."""
    return shape.groups if isinstance(shape, Grouped) else tuple((axis,) for axis in range(len(shape)))


def sizes_of(shape: Sequence[int]) -> list[int]:
    """The length of every factor."""
    return [math.prod(shape[axis] for axis in group) for group in groups_of(shape)]


def named(axes: Sequence[int]) -> str:
    """Axes of a tensor by names that einops takes: ``"a0 a2"``."""
    return " ".join(f"a{axis}" for axis in axes)


def lengths(shape: Sequence[int], axes: Sequence[int]) -> dict[str, int]:
    """The lengths of axes under the names that :func:`named` gives them."""
    return {f"a{axis}": shape[axis] for axis in axes}


def axes_in(text: str, ndim: int, name: str) -> list[list[int]]:
    """The groups on the right of ``"a b c -> (a c) b"``, as numbers of the axes on the left.

    Raises:
        ValueError: if the text does not name each of ``ndim`` axes once on both sides.
    """
    example = "; write it as 'head d_model d_head -> (head d_head) d_model'"
    try:
        left, right = (ParsedExpression(side) for side in text.split("->"))
    except (EinopsError, ValueError, AttributeError) as error:
        raise ValueError(f"group={text!r} of {name!r} is not understood ({error}){example}") from None
    axes = [axis for group in left.composition for axis in group]
    alike = left.identifiers == right.identifiers and not (left.has_ellipsis or right.has_ellipsis)
    if not alike or len(left.composition) != len(axes) or len(axes) != ndim:
        raise ValueError(f"group={text!r} must name each of the {ndim} axes of {name!r} once on both sides{example}")
    return [[axes.index(axis) for axis in group] for group in right.composition]


def largest_rank(shape: Sequence[int], factorization: Factorization) -> int:
    """The rank from which a tensor of this shape gains nothing more."""
    sizes = sizes_of(shape)
    return max(sizes) if factorization == "tucker" else math.prod(sizes) // max(sizes)


def factor_sizes(shape: Sequence[int], rank: int, factorization: Factorization) -> list[tuple[int, ...]]:
    """The sizes of a tensor's factors in one direction; no tensor gets more rank than it can use."""
    if factorization == "cp":
        return [(min(rank, largest_rank(shape, "cp")), d) for d in sizes_of(shape)]
    matrices = [(min(rank, d), d) for d in sizes_of(shape)]
    return [tuple(r for r, _ in matrices), *matrices]


def check_rank(shapes: Shapes, rank: int, factorization: Factorization) -> None:
    """Raises ValueError if the rank is not positive, or no tensor can use it."""
    most = max(largest_rank(shape, factorization) for shape in shapes.values())
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank} is outside 1 to {most}: no chosen tensor {dict(shapes)} can use more in {factorization}"
        )
