"""Networks of any size, and what their gradients cost (notebook cost)."""
