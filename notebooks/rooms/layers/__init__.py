"""Fits of residual networks of one to three layers (notebook layers)."""

from rooms import fitting as fitting  # where the notebook looks for it
