"""Small networks whose features are known."""
