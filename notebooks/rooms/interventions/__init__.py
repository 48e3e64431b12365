"""Maps of how directions act on each other (notebook interventions)."""
