"""SmolLM2, the uses of its weights, and concepts of its tokens (notebook smollm)."""
