"""One feature of a residual network drawn, with the direction that it owns lit across its layers."""

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from eigendecomp.report import plots
from eigendecomp.targets.toys.resid_mlp import ResidMLP


def heights(n: int) -> Float[Tensor, " n"]:
    """Where a column of dots stands."""
    return torch.linspace(1, -1, n)


def edges(
    ax: Axes, x: tuple[float, float], starts: Tensor, ends: Tensor, values: Float[Tensor, "starts ends"],
    color: str | None = None,
) -> None:  # fmt: skip
    """Lines from each start to each end, as wide as their values are large; the faintest are left out."""
    limit = float(values.abs().max())
    for k, j in (values.abs() > 0.06 * limit).nonzero().tolist():
        share = abs(float(values[k, j])) / limit
        shade = color or (plots.POSITIVE if values[k, j] > 0 else plots.NEGATIVE)
        look = {"lw": 1 + 4 * share, "zorder": 1} if color else {"lw": 0.2 + 1.8 * share, "alpha": 0.2 + 0.8 * share}
        ax.plot(x, [starts[k], ends[j]], color=shade, solid_capstyle="round", **look)


def network(ax: Axes, model: ResidMLP, parts: dict[str, Tensor], feature: int) -> None:
    """The network's own weights of a feature in grey and, over them, the entries of a direction.

    A matrix's part is turned so that it agrees with the weights in sign.
    """
    stream, lit = heights(len(model.W_E)), torch.zeros(len(model.W_E), dtype=torch.bool)
    lit[feature] = True
    for number, (name, w_in, w_out) in enumerate(model.weights):
        x, neurons = 2.0 * number, heights(len(w_in))
        for at, weight, key in ((x, w_in.T, "W_in"), (x + 1, w_out.T, "W_out")):
            matrix = parts[f"{name}.{key}.weight"][feature].T
            side = (stream, neurons) if key == "W_in" else (neurons, stream)
            only = weight * (lit[:, None] if key == "W_in" else lit)
            edges(ax, (at, at + 1), *side, only, "0.85")
            edges(ax, (at, at + 1), *side, matrix * (matrix * only).sum().sign())
        ax.plot([x + 1] * len(neurons), neurons, "o", ms=5, mfc="white", mec="0.2", mew=0.7, zorder=3)
        ax.text(x + 1, 1.09, f"neurons {number + 1}", ha="center", size=7)
    for number in range(len(model.layers) + 1):
        ax.plot([2 * number] * len(stream), stream, "o", ms=1.2, color="0.45", zorder=3)
        ax.plot(2 * number, stream[feature], "o", ms=4.5, color="black", zorder=4)
    ax.text(-0.12, stream[feature], f"feature {feature}", ha="right", va="center", size=8)
    ax.text(0, 1.09, "stream", ha="center", size=7)
    ax.axis("off")
