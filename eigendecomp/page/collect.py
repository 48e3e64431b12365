"""One HTML file in which people look at the directions of a decomposition: no server, no network, opens from disk.

Images, with what a class is called and what each image is::

    d.browse(images, "cnn_browse.html", names=fashion.CLASSES, labels=[fashion.CLASSES[y] for y in labels])

Text, inputs being token numbers; ``names`` says what an output is called and, unless ``tokens`` does, a token too::

    d.browse(windows, "tinystories_browse.html", names=stories.readable)

Anything else is a vector, shown as bars: ``d.browse(x, "tms_browse.html", features=[...], names=[...])``.

All that the page shows is computed here (:func:`collect`) and put in it as JSON; ``page/script.js`` draws it. Every
number comes from J u, what the directions do to each sample's output to first order: activations are ‖S^½ J u‖, and a
coefficient is the product ⟨Jᵀc, u⟩ = ⟨c, J u⟩ with a reference's cotangent. So the samples go through the model once.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor
from tqdm import tqdm

from eigendecomp.curvature import push_forward
from eigendecomp.decomposition import CHUNK, Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import KLDivergence, SquaredError
from eigendecomp.gradients import EachOutput
from eigendecomp.page.places import outputs_along, pushed, spatial_maps
from eigendecomp.page.readout import Readout
from eigendecomp.page.samples import Images, Kind, Names, Renderer, Tokens, plain, renderer
from eigendecomp.reference import Draws
from eigendecomp.support import files
from eigendecomp.support.checks import real, whole
from eigendecomp.support.examples import Examples, Inputs, as_examples, chunks
from eigendecomp.support.random import generator
from eigendecomp.target import Target

BINS = 40
LISTED = 8  # outputs, neighbours: how many are listed of each
LINES = 6  # outputs whose course is drawn
STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # pushes, over the mean activation of the top samples
MEMORY = 1 << 28  # bytes of J u at a time
TOGETHER = 16  # directions that run through the model at once, at most
HEADS = {"W_Q": 3, "W_K": 3, "W_V": 3, "W_O": 3, "b_Q": 2, "b_K": 2, "b_V": 2}  # transformer-lens: heads are axis 0


@dataclass(frozen=True)
class View:
    """What is looked at; the arguments of :func:`browse` of these names."""

    by: Literal["impact", "activation"]
    top: int
    middle: int
    steps: tuple[float, ...] | None
    threshold: float | None
    references: int
    seed: int
    progress: bool = False

    def __post_init__(self) -> None:
        if self.by not in ("impact", "activation"):
            raise ValueError(f"by={self.by!r} must be 'impact' or 'activation'")
        whole("top", self.top)
        whole("middle", self.middle, 0)
        whole("references", self.references)
        for step in self.steps or ():
            real("steps: a step", step)
        if self.threshold is not None:
            real("threshold", self.threshold, least=0)


def browse(
    d: Decomposition, inputs: Inputs, path: str | Path, *, kind: Kind | None = None, title: str = "Directions",
    names: Names | None = None, labels: Sequence[str] | None = None, tokens: Tokens | None = None,
    images: Float[Tensor, "e c h w"] | None = None, features: Sequence[str] | None = None,
    by: Literal["impact", "activation"] = "impact", top: int = 12, middle: int = 8,
    steps: Sequence[float] | None = None, threshold: float | None = None, references: int = 16, seed: int = 0,
    progress: bool = True) -> Path:  # fmt: skip
    """Write a page to look at directions, one HTML file that needs nothing else, and return its path.

    Args:
        inputs: a tensor or tuple of tensors, some hundred to some thousand samples; the first one is shown.
        kind: how samples are shown; guessed from the inputs if not given.
        names: what the outputs are called, in order, or a function of their number.
        labels: what is known of each example (or of each sample): its class, say.
        tokens: for text, the strings of every example's tokens, or a function of a token's number; else ``names``.
        images: for images, what to show in the place of the inputs (before they were standardised, say).
        features: for vectors, what their entries are called.
        by: what ranks the samples.
        top, middle: how many of the strongest samples are shown, and how many of middling strength.
        steps: how far to push along each direction; else up to twice over the mean activation of its top samples, but
            never farther than the parameters' own norm.
        threshold: the |z| from which a direction counts as active on a sample; else the fit's own, or where it has none
            a tenth of the largest |z|.
        references, seed: as in :meth:`Decomposition.impact`.
        progress: whether bars show how far it is.

    Raises:
        ValueError: for anything that cannot be shown, before work starts.
        OSError: if the file cannot be written; what was there before is then still there.
    """
    path = files.writable(path)
    view = View(by, top, middle, None if steps is None else tuple(steps), threshold, references, seed, progress)
    examples = as_examples(inputs)
    e, (p, k) = len(examples[0]), d.target.outputs(single(examples)).shape[1:]
    name = namer(names, k)
    if labels is not None and len(labels) not in (e, e * p):
        raise ValueError(f"labels has {len(labels)} entries; give one for each of the {e} examples")
    shown = renderer(kind, examples[0], p, names=names, tokens=tokens, images=images, features=features)
    write(path, render({"title": str(title), **collect(d, examples, shown, name, labels, view)}))
    return path


def namer(names: Names | None, k: int) -> Callable[[int], str]:
    """What to call each of the outputs."""
    if names is None:
        return lambda i: f"output {i}"
    if callable(names):
        return lambda i: str(names(i))
    if isinstance(names, str) or len(names) != k:
        raise ValueError(f"names has {len(names)} entries; give one for each of the model's {k} outputs, or a function")
    return lambda i: str(names[i])


# ---------------------------------------------------------------------------------------------------------------------
# All samples


@dataclass
class Measured:
    """What all samples and directions have to do with each other; equal to what the methods of these names return."""

    activation: Float[Tensor, "n v"]
    impact: Float[Tensor, "n v"]
    z: Float[Tensor, "n v"]  # encode()
    interactions: Float[Tensor, "v v"]
    readout: Readout  # of whose features the following are
    features: Float[Tensor, "n h"]
    along: Float[Tensor, "n v h"] | None  # what directions do to them to first order; None where that is large


@torch.no_grad()
def measure(d: Decomposition, examples: Examples, references: int, seed: int, progress: bool = False) -> Measured:
    """Read all samples along all directions."""
    s = d.settings
    draws = 1 if s.reference.fixed else references
    noises = generator(seed, "encode"), generator(seed, "encode")
    activation, impact, z, features, along, readout = [], [], [], [], [], Readout.of(d.target, single(examples))
    cross = torch.zeros(d.decoder.n, d.decoder.n, dtype=torch.float64)
    bar = tqdm(total=len(examples[0]), disable=not progress, desc="page: samples", leave=False)
    for part in chunks(examples, CHUNK):
        for few, h, reads, writes in changes(d, readout, part):
            bar.update(len(few[0]))
            f, shape = readout(h), (len(few[0]), len(h) // len(few[0]))
            moved = readout.root(s.divergence, f, writes)
            features.append(h)
            if writes.nbytes // len(few[0]) * len(examples[0]) <= MEMORY:
                along.append(writes.clone())
            activation.append(moved.norm(dim=-1))
            cross += torch.einsum("nvk,nwk->vw", moved, moved).cpu()
            for noise, m, products in zip(noises, (draws, 1), (impact, z), strict=True):
                c = Draws.of(s.reference, s.divergence, d.pool, shape, m, noise)(f.view(*shape, -1)).flatten(0, 1)
                products.append(reads @ readout.back(c).mT)  # (n, v, m)
    bar.close()
    scale = cross.diagonal().sqrt()
    scale = scale.outer(scale)
    return Measured(
        torch.cat(activation),
        torch.cat([one.abs().mean(-1) for one in impact]),
        torch.cat(z).squeeze(-1),
        torch.where(scale > 0, cross / scale, 0.0),
        readout,
        torch.cat(features),
        torch.cat(along) if along else None,
    )


def changes(
    d: Decomposition, readout: Readout, part: Examples
) -> Iterator[tuple[Examples, Float[Tensor, "n h"], Float[Tensor, "n v h"], Float[Tensor, "n v h"]]]:
    """A few examples at a time: they, their features h, and ∂h/∂w u for the encoder's and the decoder's directions.

    Backwards, as the gradients of all outputs, where these are few; else forwards, direction by direction.
    """
    both = d.encoder if d.settings.tied else d.encoder.beside(d.decoder)
    p, h = readout.before.outputs(single(part)).shape[1:]
    backwards = readout.weight is None and p * h <= both.n
    source = d.captured(part) if backwards else None
    size = max(1, MEMORY // (p * h * both.n * torch.finfo(d.target.dtype).bits // 8))
    for few in chunks(part, size):
        features = readout.before.outputs(few).flatten(0, 1)
        if source is not None:
            y = source(few, EachOutput()).inner(both).unflatten(0, (-1, h)).mT
        else:
            y = push_forward(readout.before, SquaredError(), both, few) / 2**0.5  # S = 2I
        yield few, features, y[:, : d.encoder.n], y[:, -d.decoder.n :]


# ---------------------------------------------------------------------------------------------------------------------
# Direction by direction


@torch.no_grad()
def collect(
    d: Decomposition,
    examples: Examples,
    shown: Renderer,
    name: Callable[[int], str],
    labels: Sequence[str] | None,
    view: View,
) -> dict[str, Any]:
    """Everything in the page, as plain values."""
    measured = measure(d, examples, view.references, view.seed, view.progress)
    n, e = len(measured.z), len(examples[0])
    known = Known(d, measured, shown, labels, view, (e, n // e))
    mapped = isinstance(shown, Images)
    chosen = [[*first, *others] if mapped else first for first, others in known.chosen]
    effects = act(d, measured, examples, chosen, len(known.chosen[0][0]), mapped, name, view.steps)
    bar = tqdm(effects, total=d.decoder.n, disable=not view.progress, desc="page: directions", leave=False)
    directions = [known.direction(v, *effect) for v, effect in enumerate(bar)]
    used = sorted({one["e"] for direction in directions for one in direction["samples"]})
    return {
        "kind": shown.kind,
        "by": view.by,
        "samples": n,
        "positions": n // e,
        "threshold": plain(known.threshold),
        "references": 1 if d.settings.reference.fixed else view.references,
        "divergence": type(d.settings.divergence).__name__,
        "probabilities": isinstance(d.settings.divergence, KLDivergence),
        "directions": directions,
        **shown.examples(used),
    }


class Known:
    """What is known of the samples and directions of a page, and how it is put down direction by direction.

    Args:
        shape: the numbers of examples and of positions.
    """

    def __init__(
        self,
        d: Decomposition,
        measured: Measured,
        shown: Renderer,
        labels: Sequence[str] | None,
        view: View,
        shape: tuple[int, int],
    ) -> None:
        self.names, self.measured, self.shown, self.labels = list(d.decoder.shapes), measured, shown, labels
        self.shape = shape
        self.strength = {"impact": measured.impact, "activation": measured.activation}
        self.rank_by = self.strength[view.by]
        size = measured.z.abs()
        least = view.threshold if view.threshold is not None else d.threshold
        self.threshold = 0.1 * float(size.max()) if least is None else least
        self.active = ((size >= self.threshold) & (size != 0)).double().mean(0)
        energy = measured.activation.double().square().mean(0)
        self.curvature = energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        self.tensors, self.heads = shares(d.decoder)
        self.chosen = [pick(self.rank_by[:, v], view.top, view.middle) for v in range(d.decoder.n)]

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
            parts = (u.select([v]).dense(key)[0] for v in range(u.n))  # one at a time: they may be large
            heads[key] = torch.stack([part.double().square().flatten(1).sum(1) for part in parts])
    return (tensors / tensors.sum(1, keepdim=True)).tolist(), heads


def neighbours(row: Float[Tensor, " v"], v: int) -> list[list[Any]]:
    """The directions that one interacts with most, and how much."""
    order = [int(other) for other in row.abs().sort(descending=True, stable=True).indices if int(other) != v]
    return [[other, plain(row[other])] for other in order[:LISTED] if row[other] != 0]


def act(
    d: Decomposition,
    measured: Measured,
    examples: Examples,
    chosen: Sequence[Sequence[int]],
    top: int,
    mapped: bool,
    name: Callable[[int], str],
    steps: Sequence[float] | None,
) -> Iterator[tuple[dict[str, Any], Float[Tensor, "m h w"] | None]]:
    """What every direction does to the outputs of the ``top`` first of its chosen samples, and maps of where.

    To first order, and pushed by steps. Maps are of all chosen samples, if they are to be ``mapped``. Several
    directions run through the model at once, as far as memory goes.
    """
    target, divergence, rows, readout = d.target, d.settings.divergence, torch.tensor(chosen), measured.readout
    p, width = readout.before.outputs(single(examples)).shape[1:]
    bits = torch.finfo(d.target.dtype).bits
    size = max(1, 8 * MEMORY // (bits * len(STEPS) * (target.size + 8 * rows.shape[1] * p * width)))
    for some in torch.arange(d.decoder.n).split(min(size, TOGETHER)):
        u, at = d.decoder.select(some), rows[some] % p
        parts = tuple(tensor[rows[some].to(tensor.device) // p] for tensor in examples)  # (v, m, …)
        if measured.along is None:
            h, y = (x.gather(2, at[..., None, None].expand(-1, -1, 1, width).to(x.device)).squeeze(2)
                    for x in outputs_along(readout.before, u, parts))  # fmt: skip
        else:
            h, y = measured.features[rows[some]], measured.along[rows[some], some[:, None]]
        f, y = readout(h), readout.along(y)
        activation = divergence.root(f[:, :top], y[:, :top]).norm(dim=-1).mean(1)
        deltas = [pushes(target, one, steps) for one in activation.tolist()]
        still = divergence.predict(f[:, :top]).mean(1)
        lines = pushed(readout.before, u, tuple(tensor[:, :top] for tensor in parts), at[:, :top], deltas, still,
                       lambda h: divergence.predict(readout(h)))  # fmt: skip
        for i in range(len(some)):
            one = tuple(tensor[i] for tensor in parts)
            maps = spatial_maps(target, divergence, u.select([i]), one, y[i]) if mapped else None
            yield effect(y[i, :top].mean(0), deltas[i], lines[i], isinstance(divergence, KLDivergence), name), maps


def pushes(target: Target, activation: float, steps: Sequence[float] | None) -> list[float]:
    """How far to push along a direction; up to twice over its mean activation, but no farther than the norm of w."""
    if steps is not None:
        return sorted({0.0, *map(float, steps)})
    norm = torch.stack([value.square().sum() for value in target.chosen.values()]).sum().sqrt().item()
    unit = min(1 / activation, norm / max(STEPS)) if activation > 0 else 0.0
    return sorted({0.0, *(step * unit for step in STEPS)})


def effect(
    mean: Float[Tensor, " k"],
    deltas: Sequence[float],
    lines: Float[Tensor, "d k"],
    logits: bool,
    name: Callable[[int], str],
) -> dict[str, Any]:
    """What a direction promotes and suppresses, from its mean J u, and the course of the outputs it moves most."""
    mean = mean - mean.mean() if logits else mean  # logits have no zero of their own
    up, down = (side.topk(min(LISTED, len(mean))) for side in (mean, -mean))
    kept = (lines.max(0).values - lines.min(0).values).topk(min(LINES, len(mean))).indices.tolist()
    return {
        "promoted": [[name(int(i)), plain(value)] for value, i in zip(*up, strict=True) if value > 0],
        "suppressed": [[name(int(i)), plain(-value)] for value, i in zip(*down, strict=True) if value > 0],
        "push": {"steps": plain(list(deltas)), "lines": [[name(i), plain(lines[:, i])] for i in kept]},
    }


def single(examples: Examples) -> Examples:
    """The first example alone."""
    return tuple(tensor[:1] for tensor in examples)


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


# ---------------------------------------------------------------------------------------------------------------------
# The file


def render(data: Mapping[str, Any]) -> str:
    """The page, with everything inside. Its rules let no script run but its own, and nothing be fetched."""
    pages = Environment(loader=PackageLoader("eigendecomp", "page"), autoescape=True, undefined=StrictUndefined)
    script, style = (cast(Any, pages.loader).get_source(pages, name)[0] for name in ("script.js", "style.css"))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":  # so that no text can end the element that it stands in
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    return pages.get_template("page.html").render(
        title=data["title"],
        data=Markup(text),
        script=Markup(script),
        style=Markup(style),
        script_hash=hashes[0],
        style_hash=hashes[1],
    )


def write(path: Path, text: str) -> None:
    """Write atomically: a temporary file beside ``path``, renamed over it."""
    files.replace(path, text.encode())
