"""What the notebooks write: figures, numbers, timings."""

from eigendecomp.support.extras import need

need("report", "matplotlib", "pandas", "seaborn")
