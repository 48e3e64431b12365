"""How directions act on each other: the curvature between two of them, sample by sample."""

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.curvature import push_forward
from eigendecomp.data import Inputs, as_examples, chunks
from eigendecomp.decomposition import Decomposition


def interactions(d: Decomposition, inputs: Inputs, *, chunk: int = 64) -> Float[Tensor, "v v"]:
    """Mean over samples of the normalised cross-curvature u_aᵀ H u_b / √(tr-share), in [−1, 1].

    The mean of u_aᵀ H(x) u_b over samples, divided by the root of the two directions' own means, so that the diagonal
    is one: the cosine, over all samples together, between what two directions do to the output. Directions that never
    move the output have zero rows.
    """
    total: Tensor | float = 0.0
    for part in chunks(as_examples(inputs), chunk):
        moved = push_forward(d.target, d.settings.divergence, d.decoder, part)
        total = total + torch.einsum("nvk,nwk->vw", moved, moved)
    assert isinstance(total, Tensor)
    scale = total.diagonal().sqrt()
    return torch.where(scale.outer(scale) > 0, total / scale.outer(scale), torch.zeros_like(total))
