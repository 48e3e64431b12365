"""Gradients captured once and kept on disk, from which any number of fits draw."""
