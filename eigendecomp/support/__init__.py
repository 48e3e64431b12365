"""What the method stands on and which knows no formula of it."""
