"""SmolLM2-135M, a model that was trained elsewhere, on texts of three kinds."""
