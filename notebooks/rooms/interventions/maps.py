"""How directions act on each other: the curvature between two of them, sample by sample."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigendecomp.decomposition import Decomposition
from eigendecomp.support.examples import Inputs
from eigendecomp.support.extras import need


def together(d: Decomposition, inputs: Inputs, *, seed: int = 0) -> Float[Tensor, "v v"]:
    """How often both directions of a pair are used, as a share of the samples that use either; the rest is zero."""
    on = (d.encode(inputs, seed, sparse=True) != 0).double()
    both = on.T @ on
    either = both.diagonal().unsqueeze(0) + both.diagonal().unsqueeze(1) - both
    return torch.where(either > 0, both / either.clamp_min(1), 0.0).to(d.decoder.norms())


def blocks(matrix: Float[Tensor, "v v"], threshold: float) -> Int[Tensor, " v"]:
    """The number of each direction's group: those joined by a chain of pairs with |interaction| ≥ ``threshold``."""
    graph = need("study", "scipy.sparse.csgraph")
    return torch.as_tensor(graph.connected_components((matrix.abs() >= threshold).numpy(), directed=False)[1])


def clustered(matrix: Float[Tensor, "v v"]) -> Int[Tensor, " v"]:
    """An order that puts directions that interact beside each other (average linkage on 1 − |interaction|)."""
    if len(matrix) < 3:
        return torch.arange(len(matrix))
    hierarchy, distances = need("study", "scipy.cluster.hierarchy"), need("study", "scipy.spatial.distance")
    distance = (1 - matrix.abs()).clamp_min(0).fill_diagonal_(0)
    condensed = distances.squareform(distance.double().numpy(), checks=False)
    return torch.as_tensor(hierarchy.leaves_list(hierarchy.linkage(condensed, "average")).copy())
