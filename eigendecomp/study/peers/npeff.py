"""Rank-one NPEFF (Matena and Raffel, 2023, arXiv:2310.04649), from its formulas.

The Fisher matrix of each sample, here H = RᵀR of unit Frobenius norm, is written as a sum of components h hᵀ that all
samples share, with coefficients that are not negative: H_n ≈ Σ_c W_nc h_c h_cᵀ. Only R is ever formed.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class NPEFF:
    """Components as unit rows h, coefficients, and the share of the matrices' square that is left."""

    rows: Float[Tensor, "c w"]
    coefficients: Float[Tensor, "n c"]
    error: float
    seconds: float = 0.0


def scaled(root: Float[Tensor, "n k w"]) -> Float[Tensor, "n k w"]:
    """R of matrices RᵀR at unit Frobenius norm; a sample without curvature is left out."""
    size = (root @ root.mT).square().sum((1, 2)).sqrt()
    return root[size > 0] / size[size > 0].sqrt()[:, None, None]


def terms(root: Float[Tensor, "n k w"], rows: Float[Tensor, "c w"]) -> tuple[Tensor, Tensor]:
    """⟨H_n, h_c h_cᵀ⟩ as (n, c) and ⟨h_b h_bᵀ, h_c h_cᵀ⟩ as (c, c)."""
    return (root @ rows.T).square().sum(1), (rows @ rows.T).square()


def loss(root: Float[Tensor, "n k w"], rows: Float[Tensor, "c w"], w: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """Σ_n ‖H_n − Σ_c W_nc h_c h_cᵀ‖² − Σ_n ‖H_n‖² over the number of samples."""
    inner, gram = terms(root, rows)
    return (((w @ gram) - 2 * inner) * w).sum() / len(root)


def updated(w: Float[Tensor, "n c"], inner: Float[Tensor, "n c"], gram: Float[Tensor, "c c"]) -> Float[Tensor, "n c"]:
    """One multiplicative update of the coefficients, which lowers the loss and keeps their signs."""
    return w * inner / (w @ gram).clamp_min(1e-12)


@torch.enable_grad()
def fit(root: Float[Tensor, "n k w"], components: int, *, seed: int, steps: int = 1500) -> NPEFF:
    """Alternate an update of the coefficients with a step of the components' gradient, from random components."""
    clock = time.process_time()
    root = scaled(root)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(components, root.shape[-1], generator=draw)
    rows = torch.nn.functional.normalize(rows, dim=1).requires_grad_()
    w = torch.rand(len(root), components, generator=draw) / components
    optimizer = torch.optim.Adam([rows], lr=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        with torch.no_grad():
            w = updated(w, *terms(root, rows))
        optimizer.zero_grad()
        loss(root, rows, w).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            rows /= rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        error = 1 + loss(root, rows, w).item()
    return NPEFF(rows.detach(), w, error, time.process_time() - clock)
