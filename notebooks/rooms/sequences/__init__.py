"""Switching features off (notebooks sequences and layers)."""
