"""Scores, floors, opponents and readings of a decomposition."""

from eigendecomp.study import autoencoders, clusters, concepts, floors, moves, rates, readings, recovery, scores

__all__ = [
    "autoencoders", "clusters", "concepts", "floors", "moves", "rates", "readings", "recovery", "scores",
]  # fmt: skip
