"""Directions in words: the vocabulary items that the factors of each weight read and write."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.decomposition import Decomposition
from eigendecomp.share.lora import is_conv1d
from eigendecomp.support.checks import whole

Names = Sequence[str] | Callable[[int], str]
Side = Literal["reads", "writes"]


@dataclass(frozen=True)
class Words:
    """What one factor of a direction says; a factor's sign is free as long as another one's turns with it."""

    direction: int
    parameter: str
    axis: int
    term: int
    side: Side | None  # None for a parameter of which no module says where its input is
    promoted: list[tuple[str | int, float]]  # largest first
    suppressed: list[tuple[str | int, float]]  # most negative first


@torch.no_grad()
def readout(
    d: Decomposition,
    unembedding: Float[Tensor, "vocabulary width"],
    k: int = 10,
    names: Names | None = None,
    *,
    embedding: Float[Tensor, "vocabulary width"] | None = None,
) -> list[Words]:
    """The k ends of unembedding @ factor for every direction, weight and factor that is as long as it is wide.

    Factors that read are multiplied with ``embedding``, where it is given. Items are numbers without ``names``.

    Raises:
        ValueError: if a matrix is none, they differ in shape, names are too few, or no factor has that length.
    """
    whole("k", k)
    embedding = unembedding if embedding is None else embedding
    check(unembedding, embedding, names)
    words = [one for along in factors(d, unembedding.shape[1]) for one in said(along, unembedding, embedding, k, names)]
    if not words:
        raise ValueError(
            f"no factor is {unembedding.shape[1]} long, as a row of the unembedding {tuple(unembedding.shape)} is; "
            f"give it as (vocabulary, width), and weights of that width among {dict(d.decoder.shapes)}"
        )
    return sorted(words, key=lambda one: one.direction)


def check(unembedding: Tensor, embedding: Tensor, names: Names | None) -> None:
    """Refuse what is no matrix of real numbers, and names that do not reach its last row."""
    for name, matrix in (("unembedding", unembedding), ("embedding", embedding)):
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.is_floating_point():
            raise ValueError(f"{name} must be a real (vocabulary, width) matrix, such as lm_head.weight")
    if embedding.shape[1] != unembedding.shape[1]:
        raise ValueError(f"embedding {tuple(embedding.shape)} is not as wide as unembedding {tuple(unembedding.shape)}")
    most = max(len(unembedding), len(embedding))
    if names is not None and not callable(names) and len(names) < most:
        raise ValueError(f"names holds {len(names)} strings; give one for each of the {most} vocabulary items")


@dataclass(frozen=True)
class AxisFactors:
    """The factors along one axis of a parameter, of all directions."""

    parameter: str
    axis: int
    side: Side | None
    factors: Float[Tensor, "v k width"]


def factors(d: Decomposition, width: int) -> Iterator[AxisFactors]:
    """The factor matrices of that width; a Tucker core is none."""
    for name, held in d.decoder.factors.items():
        matrices = held if d.decoder.factorization == "cp" else held[1:]
        for axis, matrix in enumerate(matrices):
            if matrix.shape[-1] == width:
                yield AxisFactors(name, axis, side(d.target.model, name, axis), matrix)


def side(model: nn.Module, name: str, axis: int) -> Side | None:
    """Whether an axis of a parameter is where its module's input comes in or where its output goes out."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    turned = isinstance(module, nn.Embedding) or is_conv1d(module)
    if leaf == "bias":
        return "writes"
    if leaf != "weight" or axis > 1 or not (turned or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))):
        return None
    return "writes" if (axis == 1) == turned else "reads"


def said(along: AxisFactors, unembedding: Tensor, embedding: Tensor, k: int, names: Names | None) -> Iterator[Words]:
    """One row for each direction and term."""
    matrix = embedding if along.side == "reads" else unembedding
    scores = along.factors @ matrix.to(along.factors).T
    k = min(k, len(matrix))
    for v, terms in enumerate(scores):
        for term, row in enumerate(terms):
            ends = [listed(row, (sign * row).topk(k).indices, names) for sign in (1, -1)]
            yield Words(v, along.parameter, along.axis, term, along.side, *ends)


def listed(row: Tensor, index: Tensor, names: Names | None) -> list[tuple[str | int, float]]:
    """Items with their values."""
    call = names if callable(names) or names is None else names.__getitem__
    return [(i if call is None else str(call(i)), float(row[i])) for i in index.tolist()]
