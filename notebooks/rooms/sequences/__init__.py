"""Switching features off in networks with known circuits (notebooks sequences and layers)."""
