"""Opponents, concepts and heads of the story model (notebooks tinystories and edits)."""
