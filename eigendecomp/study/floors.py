"""Floors: what directions chosen without learning, or without sparsity, reach on the same gradients."""

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.directions import Directions, Factorization, Shapes
from eigendecomp.support.random import generator


def principal_directions(g: Float[Tensor, "n w"], n_directions: int) -> Float[Tensor, "v w"]:
    """The leading right singular vectors of gradients held as rows (PCA about zero), dense and of any rank."""
    return torch.linalg.svd(g, full_matrices=False).Vh[:n_directions]


def random_directions(
    shapes: Shapes, n_directions: int, rank: int, factorization: Factorization = "cp", *, seed: int
) -> Directions:
    """Directions of the same low rank as learned ones, not learned."""
    return Directions.random(shapes, n_directions, rank, factorization, generator=generator(seed, "random"))


def sparse_error(g: Float[Tensor, "n w"], directions: Float[Tensor, "v w"], kept: float) -> float:
    """Normalised error of rebuilding gradients from fixed unit directions with ``kept`` coefficients a sample.

    The best that a fixed set of rows can do with a batch-wide budget, greedily: the largest |⟨g, u⟩| of the batch are
    kept and, for each sample, refitted by least squares on the kept directions.
    """
    z = g @ directions.T
    count = max(1, round(kept * len(g)))
    mask = z.abs() >= z.abs().flatten().topk(count).values.min()
    left = 0.0
    gram = directions @ directions.T
    for row, chosen in zip(z, mask, strict=True):
        if chosen.any():
            left += (row[chosen] @ torch.linalg.lstsq(gram[chosen][:, chosen], row[chosen, None]).solution[:, 0]).item()
    return 1 - left / g.square().sum().item()
