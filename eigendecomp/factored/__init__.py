"""Per-sample gradients as factors, never formed."""
