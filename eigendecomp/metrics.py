"""Scores: who owns what, how alike two sets of directions are, how much is rebuilt."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass
class Ownership:
    """Which known feature each direction answers to, from strengths (features, directions)."""

    owner: Int[Tensor, " v"]  # the feature with the largest strength in each direction
    selectivity: Float[Tensor, " v"]  # that feature's strength over the next one's
    owned: int  # features that own at least one direction


def ownership(strength: Float[Tensor, "features v"]) -> Ownership:
    """Who owns each direction, and by how much.

    Raises:
        ValueError: for fewer than two features, among which nothing can be told apart.
    """
    if len(strength) < 2:
        raise ValueError(f"ownership compares at least two features; got {len(strength)}")
    top = strength.topk(2, 0)
    return Ownership(
        top.indices[0], top.values[0] / top.values[1].clamp_min(1e-12), int(top.indices[0].unique().numel())
    )


def max_cosine(found: Float[Tensor, "v d"], truth: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """For every true vector the largest |cosine| with a found one."""
    return cosines(found, truth).abs().amax(0)


def matched_cosine(a: Float[Tensor, "v d"], b: Float[Tensor, "w d"]) -> Float[Tensor, " m"]:
    """|cosine| of the pairs of the one-to-one matching that makes their sum largest."""
    similarity = cosines(a, b).abs()
    rows, columns = linear_sum_assignment(-similarity.detach().numpy())
    return similarity[torch.as_tensor(rows), torch.as_tensor(columns)]


def cosines(a: Float[Tensor, "v d"], b: Float[Tensor, "w d"]) -> Float[Tensor, "v w"]:
    """Cosine similarity of every pair; zero for a zero vector."""
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def top_share(values: Float[Tensor, "n v"], k: int) -> Float[Tensor, " n"]:
    """The share of each sample's total that its k largest entries carry."""
    return values.topk(min(k, values.shape[1]), -1).values.sum(-1) / values.sum(-1).clamp_min(1e-30)
