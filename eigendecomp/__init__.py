"""Sparse, low-rank directions in a trained network's parameter space, learned by rebuilding per-sample gradients."""

from eigendecomp.curvature import per_sample_hessian
from eigendecomp.decomposition import Decomposition, decompose, interactions
from eigendecomp.direct import decompose_curvature
from eigendecomp.divergence import KLDivergence, OutputSum, SquaredError
from eigendecomp.reference import Constant, Mean, ModelSample, OtherSample, Uniform
from eigendecomp.sparsity import L1, BatchTopK
from eigendecomp.store.gradients import GradientStore

__version__ = "0.1.0"

__all__ = [
    "L1", "BatchTopK", "Constant", "Decomposition", "GradientStore", "KLDivergence", "Mean", "ModelSample",
    "OtherSample", "OutputSum", "SquaredError", "Uniform", "decompose", "decompose_curvature", "interactions",
    "per_sample_hessian",
]  # fmt: skip
