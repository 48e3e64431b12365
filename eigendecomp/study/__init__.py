"""Scores, floors, opponents and readings of a decomposition."""

from eigendecomp.study import (
    autoencoders,
    concepts,
    criteria,
    floors,
    jacobians,
    maps,
    moves,
    positions,
    rates,
    readings,
    recovery,
    scores,
    switches,
)

__all__ = [
    "autoencoders",
    "concepts",
    "criteria",
    "floors",
    "jacobians",
    "maps",
    "moves",
    "positions",
    "rates",
    "readings",
    "recovery",
    "scores",
    "switches",
]
