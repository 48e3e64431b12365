"""What is put down of each direction: its samples, its histograms, where it lies, which directions it meets."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions
from eigendecomp.page.measure import Measured
from eigendecomp.page.samples import Renderer, plain

BINS = 40
LISTED = 8  # neighbours: how many are listed
HEADS = {"W_Q": 3, "W_K": 3, "W_V": 3, "W_O": 3, "b_Q": 2, "b_K": 2, "b_V": 2}  # transformer-lens: heads are axis 0


class Known:
    """What is known of the samples and directions of a page, and how it is put down direction by direction.

    Args:
        shape: the numbers of examples and of positions.
    """

    def __init__(
        self, d: Decomposition, measured: Measured, shown: Renderer, labels: Sequence[str] | None,
        shape: tuple[int, int], by: str, threshold: float | None, top: int, middle: int) -> None:  # fmt: skip
        self.names, self.measured, self.shown, self.labels = list(d.decoder.shapes), measured, shown, labels
        self.shape = shape
        self.strength = {"impact": measured.impact, "activation": measured.activation}
        self.rank_by = self.strength[by]
        size = measured.z.abs()
        least = threshold if threshold is not None else d.threshold
        self.threshold = 0.1 * float(size.max()) if least is None else least
        self.active = ((size >= self.threshold) & (size != 0)).double().mean(0)
        energy = measured.activation.double().square().mean(0)
        self.curvature = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        self.tensors, self.heads = shares(d.decoder)
        self.chosen = [pick(self.rank_by[:, v], top, middle) for v in range(d.decoder.n)]

    def direction(self, v: int, acts: Mapping[str, Any], maps: Float[Tensor, "m h w"] | None) -> dict[str, Any]:
        """One direction: its samples, their maps if there are any, what it does, and what it is made of."""
        first, others = self.chosen[v]
        column = {key: values[:, v].view(self.shape) for key, values in self.strength.items()}
        samples = [self.sample(v, row, "top", column) for row in first]
        samples += [self.sample(v, row, "middle", column) for row in others]
        for sample, one in zip(samples, () if maps is None else maps, strict=maps is not None):
            sample["map"] = packed(one)
        about = [one["label"] or self.shown.about(one["e"], one["p"]) for one in samples[: len(first)]]
        return {
            "about": common(about, self.rank_by[first, v].tolist()),
            "alive": bool(self.active[v] > 0),
            "active": plain(self.active[v]),
            "curvature": plain(self.curvature[v]),
            **{key: plain(values.max()) for key, values in column.items()},
            "histograms": {key: histogram(values) for key, values in column.items()},
            "samples": samples,
            "tensors": [[key, plain(share)] for key, share in zip(self.names, self.tensors[v], strict=True)],
            "heads": [[key, plain(values[v])] for key, values in self.heads.items()],
            "interactions": neighbours(self.measured.interactions[v], v),
            **acts,
        }

    def sample(self, v: int, row: int, group: str, column: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        """One sample of a direction, whose strengths on all samples are ``column``."""
        (examples, positions), labels = self.shape, self.labels
        e, p = row // positions, row % positions
        return {
            "e": e,
            "p": p,
            "group": group,
            "label": None if labels is None else str(labels[e if len(labels) == examples else row]),
            "z": plain(self.measured.z[row, v]),
            **{key: plain(values[e, p]) for key, values in column.items()},
            **self.shown.sample(e, p, column),
        }


def pick(strength: Float[Tensor, " n"], top: int, middle: int) -> tuple[list[int], list[int]]:
    """The strongest samples, and of the others those nearest to evenly spaced levels between ¾ and ¼ of the largest."""
    order = strength.sort(descending=True, stable=True).indices
    first, rest = order[:top].tolist(), order[top:]
    chosen: list[int] = []
    for level in torch.linspace(0.75, 0.25, middle).tolist() if middle else ():
        if len(rest) == 0:
            break
        at = int((strength[rest] - level * strength.max()).abs().argmin())
        chosen.append(int(rest[at]))
        rest = torch.cat([rest[:at], rest[at + 1 :]])
    return first, sorted(chosen, key=lambda row: -float(strength[row]))


def common(about: Sequence[str | None], weights: Sequence[float]) -> list[str]:
    """What the top samples have in common, in order of the strength that it comes with: three at most."""
    total: Counter[str] = Counter()
    for text, weight in zip(about, weights, strict=True):
        if text:
            total[text] += weight  # pyright: ignore[reportArgumentType]
    return [text for text, weight in total.most_common(3) if weight > 0.1 * sum(weights)]


def histogram(values: Float[Tensor, "e p"]) -> dict[str, Any]:
    """Counts in equal bins from zero to the largest value."""
    most = float(values.max())
    counts = torch.histc(values.float(), BINS, 0, most if most > 0 else 1.0)
    return {"most": plain(most), "counts": [int(count) for count in counts.tolist()]}


def shares(u: Directions) -> tuple[list[list[float]], dict[str, Float[Tensor, "v heads"]]]:
    """Each direction's squared norm by tensor, as a share, and of the tensors that have heads by head."""
    tensors, heads = u.norms(by_tensor=True).double().square(), {}
    for key, shape in u.shapes.items():
        if HEADS.get(key.rsplit(".", 1)[-1]) == len(shape):
            formed = (u.select([v]).dense(key)[0] for v in range(u.n))  # one at a time: they may be large
            heads[key] = torch.stack([one.double().square().flatten(1).sum(1) for one in formed])
    return (tensors / tensors.sum(1, keepdim=True)).tolist(), heads


def neighbours(row: Float[Tensor, " v"], v: int) -> list[list[Any]]:
    """The directions that one interacts with most, and how much."""
    order = [int(other) for other in row.abs().sort(descending=True, stable=True).indices if int(other) != v]
    return [[other, plain(row[other])] for other in order[:LISTED] if row[other] != 0]


def packed(values: Float[Tensor, "h w"]) -> dict[str, Any]:
    """A map as signed bytes, the largest entry being 127."""
    most = float(values.abs().max())
    scaled = (values / most * 127).round().to(torch.int8) if most > 0 else torch.zeros_like(values, dtype=torch.int8)
    return {
        "height": values.shape[0],
        "width": values.shape[1],
        "sum": plain(values.sum()),
        "bytes": base64.b64encode(scaled.cpu().numpy().tobytes()).decode(),
    }
