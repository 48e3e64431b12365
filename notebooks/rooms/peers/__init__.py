"""The trained toys that the peers take apart (notebook peers)."""
