"""The direct criteria of the propositions (notebooks curvature and manifold)."""
