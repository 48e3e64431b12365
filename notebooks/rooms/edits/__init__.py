"""Directions and their rivals as edits of the story model (notebook edits)."""
