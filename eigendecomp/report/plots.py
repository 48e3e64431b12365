"""One style for every figure, and the few drawings that several notebooks share."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

# Okabe and Ito's palette, which the common kinds of colour blindness keep apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
# One meaning a colour, in all notebooks. "Truth" is whatever a method cannot pass: the network's own, or a probe's.
OURS, SAE, PCA, RANDOM, TRUTH = COLORS[0], COLORS[1], COLORS[2], "#8C8C8C", "#000000"
PART = "#7FB8D8"  # a part of a direction: in one head, in one layer
CLUSTERS_OF_INPUTS, CLUSTERS_OF_GRADIENTS = COLORS[3], COLORS[5]
SAMPLES = COLORS[4]  # single gradients and training inputs, drawn at random
UNITS = "#7F5539"  # the network's own: channels, neurons, heads
LABELLED = "#5E3C99"  # made from labels: steps along gradients, LoRA, ROME
PEER = "#882255"  # another method of parameter decomposition
SIGNED, MAGNITUDE = "RdBu_r", "viridis"
POSITIVE, NEGATIVE = "#B2182B", "#2166AC"  # of signs, as in SIGNED
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
        annot=numbers, fmt=".2f", annot_kws={"size": 7}, cbar=bool(label), cbar_kws={"label": label} if label else None,
        xticklabels=list(columns) or False, yticklabels=list(rows) or False,
    )  # fmt: skip
    ax.tick_params(length=0)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)


def two_layer(ax: Axes, w: Tensor, b: Tensor, *, limit: float, size: float = 15) -> None:
    """A network of inputs, hidden units and their sum: weights W as coloured edges, biases b as coloured units."""
    color = ScalarMappable(Normalize(-limit, limit), SIGNED).to_rgba
    hidden, inputs = w.shape
    left, middle = ([(x, (n - 1) / 2 - i) for i in range(n)] for x, n in ((0.0, inputs), (1.25, hidden)))
    right = (2.0, 0.0)
    for unit in middle:
        ax.plot(*zip(unit, right, strict=True), color="0.8", lw=1, zorder=1)
    edges = sorted((abs(float(w[j, i])), j, i) for j in range(hidden) for i in range(inputs))  # the strongest on top
    for strength, j, i in edges:
        (x, y), (x2, y2), value = left[i], middle[j], float(w[j, i])
        width = 0.8 + 4.5 * strength / limit
        if strength > 0.02 * limit:
            ax.plot([x, x2], [y, y2], color="0.5", lw=width + 0.7, zorder=2, solid_capstyle="round")
        ax.plot([x, x2], [y, y2], color=color(value), lw=width, zorder=2, solid_capstyle="round")  # pyright: ignore[reportArgumentType]
        at = 0.5 if i == j else 0.27
        label(ax, x + at * (x2 - x), y + at * (y2 - y), value)
    for j, (x, y) in enumerate(middle):
        node(ax, x, y, color(float(b[j])), size, f"$h_{j + 1}$")  # pyright: ignore[reportArgumentType]
        label(ax, x, y + (0.33 if j == 0 else -0.33), float(b[j]), "b=")
    for i, source in enumerate(left):
        node(ax, *source, "white", size, f"$x_{i + 1}$")
    node(ax, *right, "white", size, "$f$")
    ax.set(xlim=(-0.25, 2.25), ylim=(-1.0, 1.0))
    ax.axis("off")


def layered(
    ax: Axes,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    limit: float,
    nodes: tuple[Tensor, Tensor] | None = None,
    size: float = 5,
) -> None:
    """A network of layers, left to right: weights (in, out) as coloured edges, biases as coloured units.

    ``biases`` has one entry a layer of units; ``nodes`` fills first and last units in grey by input and output.
    """
    color = ScalarMappable(Normalize(-limit, limit), SIGNED).to_rgba
    sizes = [len(weights[0]), *(w.shape[1] for w in weights)]
    units = [[(float(x), (n - 1) / 2 - i) for i in range(n)] for x, n in enumerate(sizes)]
    for left, right, w in zip(units, units[1:], weights, strict=False):
        for i, j in sorted(np.ndindex(*w.shape), key=lambda at: abs(float(w[at]))):  # the strongest on top
            strength = abs(float(w[i, j])) / limit
            xs, ys = zip(left[i], right[j], strict=True)
            ax.plot(xs, ys, color=color(float(w[i, j])), lw=0.3 + 2.6 * strength, zorder=2 + strength)  # pyright: ignore[reportArgumentType]
    for layer, bias in zip(units, biases, strict=True):
        for i, (x, y) in enumerate(layer):
            fill = "white" if bias is None else color(float(bias[i]))  # pyright: ignore[reportArgumentType]
            if nodes is not None and layer in (units[0], units[-1]):
                fill = str(1 - min(1.0, max(0.0, float(nodes[layer is units[-1]][i]))))
            ax.plot(x, y, "o", ms=size, mfc=fill, mec="0.25", mew=0.6, zorder=4)
    ax.margins(0.12)
    ax.axis("off")


def node(ax: Axes, x: float, y: float, fill, size: float, text: str) -> None:
    """One unit of a network; dark fills get white text."""
    light = np.dot(to_rgb(fill), (0.3, 0.59, 0.11)) > 0.5
    ax.plot(x, y, "o", ms=size, mfc=fill, mec="0.25", mew=0.8, zorder=3)
    ax.text(x, y, text, ha="center", va="center", size=7, color="black" if light else "white", zorder=4)


def called(name: Any) -> Any:
    """A method's name as it is shown: records say "ours" where figures and tables say "directions"."""
    return re.sub(r"\bours\b", "directions", name) if isinstance(name, str) else name


def dot(ax: Axes, x: float, y: float, color: str, *, larger: bool = False, marker: str = "o", size: float = 5) -> None:
    """A point of a fit: filled, or open where it stands for the larger of two sizes."""
    ax.plot(x, y, marker, color=color, ms=size, mfc="white" if larger else color)


def name_dots(figure: Figure, filled: str, opened: str, **options) -> None:
    """A small legend above a figure's right corner, of what filled and open dots are."""
    fills = {filled: "0.3", opened: "white"}
    handles = [Line2D([], [], ls="", marker="o", ms=4.5, color="0.3", mfc=fill, label=label)
               for label, fill in fills.items()]  # fmt: skip
    figure.legend(handles=handles, **{"loc": "outside upper right", "ncols": 2, "handletextpad": 0.1} | options)


def name_line(ax: Axes, x: float, y: float, text: str, color: str, **options) -> None:
    """A line's name beside it, in its colour: three points right of (x, y) unless told otherwise."""
    ax.annotate(text, (x, y), **{"xytext": (3, 0), "textcoords": "offset points", "va": "center"} | options,
                color=color, size=7)  # fmt: skip


def name_ends(ax: Axes, x: float, ends: Mapping[str, tuple[float, str]], *, gap: float) -> None:
    """Lines' names, {name: (y, colour)}, beside their ends at x; of two closer than a gap the upper is raised."""
    last = -np.inf
    for name, (y, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        last = max(y, last + gap)
        name_line(ax, x, last, name, color, xytext=(5, 0), annotation_clip=False)


def label(ax: Axes, x: float, y: float, value: float, before: str = "") -> None:
    """A number on a drawing, on white; one that rounds to zero has no sign."""
    text = f"{before}{round(value, 2) + 0.0:.2f}".replace("-", "−")
    box = {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.9}
    ax.text(x, y, text, ha="center", va="center", size=7, bbox=box, zorder=5)
