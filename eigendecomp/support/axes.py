"""Axes named as einops names them."""

from einops import EinopsError
from einops.parsing import ParsedExpression


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
