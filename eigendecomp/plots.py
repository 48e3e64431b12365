"""One style for every figure, and the few drawings that several notebooks share."""

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's palette, which the common kinds of colour blindness keep apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
OURS, SAE, PCA, RANDOM, TRUTH = COLORS[0], COLORS[1], COLORS[2], "#8C8C8C", "#000000"
SIGNED, MAGNITUDE = "RdBu_r", "viridis"
COLUMN, PAGE = 3.35, 6.9  # widths in inches: one column of the paper, both


def style() -> None:
    """Set the shared style; every notebook calls it once."""
    sns.set_theme(context="paper", style="ticks", palette=COLORS)
    mpl.rcParams.update({
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "savefig.bbox": "tight",
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "legend.fontsize": 7,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "pdf.fonttype": 42,
        "svg.hashsalt": "eigendecomp",
    })  # fmt: skip


def panels(
    rows: int = 1, columns: int = 1, *, width: float = PAGE, height: float = 2.0, **options
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes in reading order; ``height`` is that of one row."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, **options)
    return figure, list(axes.flat)


def heat(
    ax: Axes,
    values: Tensor,
    *,
    signed: bool,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    numbers: bool = False,
    limit: float | None = None,
    label: str = "",
) -> None:
    """A matrix as colours: diverging about zero where it is signed, and from zero up where it is not."""
    limit = float(values.abs().max()) if limit is None else limit
    sns.heatmap(
        values.detach().numpy(), ax=ax, cmap=SIGNED if signed else MAGNITUDE, vmin=-limit if signed else 0, vmax=limit,
        annot=numbers, fmt=".2f", annot_kws={"size": 6}, cbar=bool(label), cbar_kws={"label": label} if label else None,
        xticklabels=list(columns) or False, yticklabels=list(rows) or False,
    )  # fmt: skip
    ax.tick_params(length=0)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
