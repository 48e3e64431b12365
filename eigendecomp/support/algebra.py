"""Products of factors that torch has no name for."""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def khatri_rao(factors: Sequence[Float[Tensor, "v k _"]]) -> Float[Tensor, "v k d"]:
    """The flattened outer product over axes of every rank-one term."""
    return reduce(lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2), factors)


def kronecker(core: Float[Tensor, "v ..."], factors: Sequence[Float[Tensor, "v r d"]]) -> Float[Tensor, "v r d"]:
    """The Kronecker product over axes of every direction's factors; of none, a single one."""
    step = lambda a, b: torch.einsum("vrd,vse->vrsde", a, b).flatten(3).flatten(1, 2)  # noqa: E731
    return reduce(step, factors) if factors else core.new_ones(core.shape[0], 1, 1)


class SelfGram(torch.autograd.Function):
    """x xᵀ, whose two equal halves go back as one product."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "v d"]) -> Float[Tensor, "v v"]:
        ctx.save_for_backward(x)
        return x @ x.T

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return (grad[0] + grad[0].T) @ ctx.saved_tensors[0]


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, without the integer zero that ``sum`` starts from."""
    return reduce(torch.add, terms)


def strongest(strengths: Iterable[Float[Tensor, "n v"]], k: int) -> tuple[Float[Tensor, "v k"], Int[Tensor, "v k"]]:
    """The k largest of every column and their places, over all pieces, of which one is held at a time."""
    best = places = torch.empty(0)
    seen = 0
    for some in strengths:
        index = torch.arange(seen, seen + len(some), device=some.device).expand(some.shape[1], -1)
        best, places = (torch.cat([best, some.T], 1), torch.cat([places, index], 1)) if seen else (some.T, index)
        seen += len(some)
        best, order = best.topk(min(k, seen), 1)
        places = places.gather(1, order)
    return best, places
