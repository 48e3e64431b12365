"""A story model, its tokenizer and its stories."""

from eigendecomp.targets.stories.model import load_hub_model, load_model, load_stories, readable, token_windows

__all__ = ["load_hub_model", "load_model", "load_stories", "readable", "token_windows"]
