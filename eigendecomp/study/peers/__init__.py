"""Peers: other decompositions of parameters, written from their formulas."""

from eigendecomp.study.peers import l3d, npeff, spd

__all__ = ["l3d", "npeff", "spd"]
