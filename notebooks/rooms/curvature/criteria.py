"""How much of per-sample Hessians a set of directions explains: the draft's two criteria, from R(x) with H = RᵀR."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.divergence import Divergence
from eigendecomp.gradients import FunctionalSource
from eigendecomp.reference import Draws, Reference
from eigendecomp.support.examples import Inputs, as_examples
from eigendecomp.target import Target


def drawn_gradients(
    model: nn.Module,
    x: Inputs,
    divergence: Divergence,
    reference: Reference,
    draws: int,
    generator: torch.Generator,
    *,
    parameters: Sequence[str] = ("*",),
) -> Float[Tensor, "n m w"]:
    """Every sample's gradients against ``draws`` references, formed; small models only."""
    target, examples = Target(model, parameters), as_examples(x)
    f = target.outputs(examples)
    pool = reference.prepare(divergence, divergence.predict(f.flatten(0, 1)), generator)
    drawn = Draws.of(reference, divergence, pool, (f.shape[0], f.shape[1]), draws, generator)
    return FunctionalSource(target)(examples, drawn).flat().unflatten(0, (-1, draws))


def mean_hessian_directions(root: Float[Tensor, "n k w"], n_directions: int) -> Float[Tensor, "v w"]:
    """The leading eigenvectors of the mean Hessian, dense and of any rank, from R(x) with H(x) = RᵀR."""
    rows = root.flatten(0, 1)
    return torch.linalg.eigh(rows.mT @ rows).eigenvectors.mT.flip(0)[:n_directions]


def orthonormal(rows: Float[Tensor, "... m w"]) -> Float[Tensor, "... r w"]:
    """An orthonormal basis of what the rows span; where that has fewer dimensions than r, the others are zero."""
    _, size, basis = torch.linalg.svd(rows, full_matrices=False)
    small = torch.finfo(rows.dtype).eps * max(rows.shape[-2:]) * size[..., :1]
    return basis * (size > small).unsqueeze(-1)


def explained_share(
    root: Float[Tensor, "n k w"], rows: Float[Tensor, "m w"] | Float[Tensor, "n m w"]
) -> Float[Tensor, " n"]:
    """tr(P H P) / tr H of every sample, P the projector on the rows' span (one set for all samples, or one each).

    A sample without curvature has the share 0.
    """
    total = root.square().sum((1, 2))
    return (root @ orthonormal(rows).mT).square().sum((1, 2)) / total.clamp_min(torch.finfo(root.dtype).tiny)


@dataclass
class Rebuilt:
    """How much of the Hessians of given samples a set of directions rebuilds; every sample counts by its own size."""

    trace: float  # Σ tr(P H P) / Σ tr H, with P the projector on the directions' span
    error: float  # √(Σ ‖H − P H P‖² / Σ ‖H‖²), Frobenius
    plain_error: float  # the same with UᵀU, as the draft writes it, in the place of P


def rebuilt_hessians(root: Float[Tensor, "n k w"], directions: Float[Tensor, "v w"]) -> Rebuilt:
    """The draft's first criterion. From ‖RᵀR‖ = ‖RRᵀ‖ and the like: nothing of size w × w is formed.

    Raises:
        ValueError: if no sample has any curvature.
    """
    total, square = root.square().sum(), (root @ root.mT).square().sum()
    if not total > 0:
        raise ValueError("the Hessian is zero for all samples: there is nothing to rebuild")
    inside = root @ orthonormal(directions).mT
    z, gram = root @ directions.mT, directions @ directions.mT
    error = 1 - (inside @ inside.mT).square().sum() / square
    plain = 1 - 2 * (z @ z.mT).square().sum() / square + (z @ gram @ z.mT).square().sum() / square
    roots = (max(value.item(), 0.0) ** 0.5 for value in (error, plain))
    return Rebuilt((inside.square().sum() / total).item(), *roots)


def strongest_share(root: Float[Tensor, "n k w"], directions: Float[Tensor, "v w"], k: int = 1) -> float:
    """The draft's second criterion: Σ tr(P H P) / Σ tr H with P on each sample's own k strongest directions."""
    strength = (root @ directions.mT).square().sum(1)
    chosen = directions[strength.topk(min(k, len(directions)), -1).indices]
    total = root.square().sum((1, 2))
    return ((explained_share(root, chosen) * total).sum() / total.sum()).item()
