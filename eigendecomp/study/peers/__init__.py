"""Peers: other decompositions of parameters, written from their formulas, and scores that hold for all of them."""

from eigendecomp.study.peers import l3d, npeff, scores, spd

__all__ = ["l3d", "npeff", "scores", "spd"]
