"""Switching features off in networks with known circuits (notebook sequences)."""

from rooms import switches as switches  # where the notebook looks for it
