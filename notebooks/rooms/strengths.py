"""Strengths of other directions on a truth's features, on the gradients of a decomposition: floors of recovery."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions, Shapes
from eigendecomp.gradients import Formed, Gradients
from eigendecomp.study.recovery import Parts, Truth, by_feature


def random_strength(d: Decomposition, directions: Directions, truth: Truth) -> Tensor:
    """Impacts that other low-rank directions would have as encoders of this decomposition's gradients."""
    return _strength(d, lambda g: g.inner(directions), truth, 16)


def dense_strength(d: Decomposition, directions: Parts, truth: Truth, references: int = 16) -> Tensor:
    """The same for directions held as numbers."""
    flat = torch.cat([directions[name].flatten(1) for name in d.target.shapes], 1)
    return _strength(d, lambda g: g.flat() @ flat.T, truth, references)


def _strength(d: Decomposition, inner: Callable[[Gradients], Tensor], truth: Truth, references: int) -> Tensor:
    impact = torch.cat([inner(g).abs() for g in d.gradients(truth.inputs, references, 0)])
    return by_feature(impact.unflatten(0, (-1, references)).mean(1), truth)


def principal_parts(g: Float[Tensor, "n w"], n: int, shapes: Shapes) -> dict[str, Tensor]:
    """The leading principal components of gradients held as rows, by parameter; from their Gram matrix."""
    _, vectors = torch.linalg.eigh(g @ g.T)
    return Formed(shapes, torch.nn.functional.normalize(vectors[:, -n:].flip(1).T @ g, dim=1)).dense()
