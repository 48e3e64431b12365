"""Scores, floors, opponents and readings of a decomposition."""

from eigendecomp.study import (
    autoencoders,
    clusters,
    concepts,
    criteria,
    floors,
    jacobians,
    maps,
    moves,
    rates,
    readings,
    recovery,
    scores,
    switches,
)

__all__ = [
    "autoencoders",
    "clusters",
    "concepts",
    "criteria",
    "floors",
    "jacobians",
    "maps",
    "moves",
    "rates",
    "readings",
    "recovery",
    "scores",
    "switches",
]
