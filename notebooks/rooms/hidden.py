"""Vectors in the hidden layer of the toy model of superposition: its features', and those that directions have."""

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.targets.toys.tms import TMS


def feature_vectors(model: TMS) -> dict[str, Float[Tensor, "features hidden"]]:
    """By parameter, the hidden vector along which feature i's gradient on it lies.

    ∂f_i/∂W_in is x ⊗ W_out[:, i] and ∂f_i/∂W_out[:, i] is xW_in, which is x_i W_in[i] for a feature alone: each
    matrix's gradient shows the other one's vector.
    """
    w_in = model.W_in.detach()
    return {"W_in": w_in} if model.W_out is None else {"W_in": model.W_out.detach().T, "W_out": w_in}


def hidden_vectors(directions: dict[str, Tensor]) -> dict[str, Float[Tensor, "v hidden"]]:
    """By parameter, the leading hidden-side singular vector of each direction, scaled by its singular value.

    Its sign is that of the largest entry on the features' side.
    """
    vectors = {}
    for name in ("W_in", "W_out"):
        if name in directions:
            matrix = directions[name].detach() if name == "W_in" else directions[name].detach().mT
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            sign = u[:, :, 0].gather(1, u[:, :, 0].abs().argmax(1, keepdim=True)).sign()
            vectors[name] = sign * s[:, :1] * vh[:, 0]
    return vectors
