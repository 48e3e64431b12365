"""What the notebooks write: figures, numbers, timings."""
