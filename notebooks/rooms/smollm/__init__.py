"""Concepts of tokens in SmolLM2 (notebook smollm)."""
