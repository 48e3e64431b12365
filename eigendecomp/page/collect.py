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

from eigendecomp.curvature import push_forward
from eigendecomp.decomposition import CHUNK, Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import KLDivergence, SquaredError
from eigendecomp.gradients import EachOutput
from eigendecomp.page.places import outputs_along, spatial_maps
from eigendecomp.page.samples import Images, Kind, Names, Renderer, Tokens, plain, renderer
from eigendecomp.reference import Draws
from eigendecomp.support import files
from eigendecomp.support.checks import real, whole
from eigendecomp.support.examples import Examples, Inputs, as_examples, chunks
from eigendecomp.support.random import generator

BINS = 40
LISTED = 8  # outputs, neighbours: how many are listed of each
LINES = 6  # outputs whose course is drawn
STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # pushes, over the mean activation of the top samples
MEMORY = 1 << 28  # bytes of J u at a time
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
    d: Decomposition,
    inputs: Inputs,
    path: str | Path,
    *,
    kind: Kind | None = None,
    title: str = "Directions",
    names: Names | None = None,
    labels: Sequence[str] | None = None,
    tokens: Tokens | None = None,
    images: Float[Tensor, "e c h w"] | None = None,
    features: Sequence[str] | None = None,
    by: Literal["impact", "activation"] = "impact",
    top: int = 12,
    middle: int = 8,
    steps: Sequence[float] | None = None,
    threshold: float | None = None,
    references: int = 16,
    seed: int = 0,
) -> Path:
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

    Raises:
        ValueError: for anything that cannot be shown, before work starts.
        OSError: if the file cannot be written; what was there before is then still there.
    """
    path = files.writable(path)
    view = View(by, top, middle, None if steps is None else tuple(steps), threshold, references, seed)
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


@torch.no_grad()
def measure(d: Decomposition, examples: Examples, references: int, seed: int) -> Measured:
    """Read all samples along all directions."""
    s = d.settings
    draws = 1 if s.reference.fixed else references
    noises = generator(seed, "encode"), generator(seed, "encode")
    activation, impact, z = [], [], []
    cross = torch.zeros(d.decoder.n, d.decoder.n, dtype=torch.float64)
    for part in chunks(examples, CHUNK):
        for few, f, reads, writes in changes(d, part):
            shape = len(few[0]), len(f) // len(few[0])
            moved = s.divergence.root(f.unsqueeze(1), writes)
            activation.append(moved.norm(dim=-1))
            cross += torch.einsum("nvk,nwk->vw", moved, moved).cpu()
            for noise, m, found in zip(noises, (draws, 1), (impact, z), strict=True):
                c = Draws.of(s.reference, s.divergence, d.pool, shape, m, noise)(f.view(*shape, -1)).flatten(0, 1)
                found.append(reads @ c.mT)  # (n, v, m)
    scale = cross.diagonal().sqrt()
    scale = scale.outer(scale)
    return Measured(
        torch.cat(activation),
        torch.cat([one.abs().mean(-1) for one in impact]),
        torch.cat(z).squeeze(-1),
        torch.where(scale > 0, cross / scale, 0.0),
    )


def changes(
    d: Decomposition, part: Examples
) -> Iterator[tuple[Examples, Float[Tensor, "n k"], Float[Tensor, "n v k"], Float[Tensor, "n v k"]]]:
    """A few examples at a time: they, their outputs f, and J u for the encoder's and for the decoder's directions.

    Backwards, as the gradients of all outputs, where these are few; else forwards, direction by direction.
    """
    both = d.encoder if d.settings.tied else d.encoder.beside(d.decoder)
    p, k = d.target.outputs(single(part)).shape[1:]
    backwards = p * k <= both.n
    source = d.captured(part) if backwards else None
    size = max(1, MEMORY // (p * k * both.n * torch.finfo(d.target.dtype).bits // 8))
    for few in chunks(part, size):
        f = d.target.outputs(few).flatten(0, 1)
        if source is not None:
            y = source(few, EachOutput()).inner(both).unflatten(0, (-1, k)).mT
        else:
            y = push_forward(d.target, SquaredError(), both, few) / 2**0.5  # S = 2I
        yield few, f, y[:, : d.encoder.n], y[:, -d.decoder.n :]


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
    found = measure(d, examples, view.references, view.seed)
    strength = {"impact": found.impact, "activation": found.activation}
    n, e = len(found.z), len(examples[0])
    p = n // e
    cut = view.threshold if view.threshold is not None else d.threshold
    cut = 0.1 * float(found.z.abs().max()) if cut is None else cut
    active = ((found.z.abs() >= cut) & (found.z != 0)).double().mean(0)
    energy = found.activation.double().square().mean(0)
    tensors, heads = shares(d.decoder)
    directions = []
    for v in range(d.decoder.n):
        first, others = pick(strength[view.by][:, v], view.top, view.middle)
        column = {key: values[:, v].view(e, p) for key, values in strength.items()}
        samples = []
        for row in (*first, *others):
            at = row // p, row % p
            samples.append({
                "e": at[0],
                "p": at[1],
                "group": "top" if len(samples) < len(first) else "middle",
                "label": None if labels is None else str(labels[at[0] if len(labels) == e else row]),
                "z": plain(found.z[row, v]),
                **{key: plain(values[at]) for key, values in column.items()},
                **shown.sample(*at, column),
            })  # fmt: skip
        mapped = isinstance(shown, Images)
        acts, maps = act(d, v, examples, [*first, *others] if mapped else first, len(first), mapped, name, view.steps)
        for sample, one in zip(samples, () if maps is None else maps, strict=maps is not None):
            sample["map"] = packed(one)
        about = [one["label"] or shown.about(one["e"], one["p"]) for one in samples[: len(first)]]
        directions.append({
            "about": common(about, strength[view.by][first, v].tolist()),
            "alive": bool(active[v] > 0),
            "active": plain(active[v]),
            "curvature": plain(energy[v] / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)),
            **{key: plain(values.max()) for key, values in column.items()},
            "histograms": {key: histogram(values) for key, values in column.items()},
            "samples": samples,
            "tensors": [[key, plain(share)] for key, share in zip(d.decoder.shapes, tensors[v], strict=True)],
            "heads": [[key, plain(values[v])] for key, values in heads.items()],
            "interactions": neighbours(found.interactions[v], v),
            **acts,
        })  # fmt: skip
    used = sorted({one["e"] for direction in directions for one in direction["samples"]})
    return {
        "kind": shown.kind,
        "by": view.by,
        "samples": n,
        "positions": p,
        "threshold": plain(cut),
        "references": 1 if d.settings.reference.fixed else view.references,
        "divergence": type(d.settings.divergence).__name__,
        "probabilities": isinstance(d.settings.divergence, KLDivergence),
        "directions": directions,
        **shown.examples(used),
    }


def pick(strength: Float[Tensor, " n"], top: int, middle: int) -> tuple[list[int], list[int]]:
    """The strongest samples, and of the others those nearest to evenly spaced levels between ¾ and ¼ of the largest."""
    order = strength.sort(descending=True, stable=True).indices
    first, rest = order[:top].tolist(), order[top:]
    found: list[int] = []
    for level in torch.linspace(0.75, 0.25, middle).tolist() if middle else ():
        if len(rest) == 0:
            break
        at = int((strength[rest] - level * strength.max()).abs().argmin())
        found.append(int(rest[at]))
        rest = torch.cat([rest[:at], rest[at + 1 :]])
    return first, sorted(found, key=lambda row: -float(strength[row]))


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
    v: int,
    examples: Examples,
    rows: Sequence[int],
    top: int,
    mapped: bool,
    name: Callable[[int], str],
    steps: Sequence[float] | None,
) -> tuple[dict[str, Any], Float[Tensor, "m h w"] | None]:
    """What a direction does to the outputs of the ``top`` first of some samples: to first order, and pushed by steps.

    And maps of where it does so in all of these samples, if they are to be ``mapped``.
    """
    divergence, target, u = d.settings.divergence, d.target, d.decoder.select([v])
    p = target.call(single(examples)).shape[1]
    part, at = tuple(tensor[[row // p for row in rows]] for tensor in examples), [row % p for row in rows]
    f, y = (x[range(len(rows)), at] for x in outputs_along(target, u, part))
    maps = spatial_maps(target, divergence, u, part, y) if mapped else None
    f, y, part, at = f[:top], y[:top], tuple(tensor[:top] for tensor in part), at[:top]
    mean = y.mean(0)
    if isinstance(divergence, KLDivergence):  # logits have no zero of their own
        mean = mean - mean.mean()
    up, down = (side.topk(min(LISTED, len(mean))) for side in (mean, -mean))
    activation = divergence.root(f, y).norm(dim=-1).mean().item()
    norm = torch.stack([value.square().sum() for value in target.chosen.values()]).sum().sqrt().item()
    unit = min(1 / activation, norm / max(STEPS)) if activation > 0 else 0.0
    deltas = sorted({0.0, *(step * unit for step in STEPS)} if steps is None else {0.0, *map(float, steps)})
    course = []
    for delta in deltas:
        with d.perturbed({v: delta}):
            moved = target.call(part)[range(top), at] if delta else f
        course.append(divergence.predict(moved).mean(0))
    lines = torch.stack(course).nan_to_num()  # what overflows is not drawn
    kept = (lines.max(0).values - lines.min(0).values).topk(min(LINES, len(mean))).indices.tolist()
    return {
        "promoted": [[name(int(i)), plain(value)] for value, i in zip(*up, strict=True) if value > 0],
        "suppressed": [[name(int(i)), plain(-value)] for value, i in zip(*down, strict=True) if value > 0],
        "push": {"steps": plain(deltas), "lines": [[name(i), plain(lines[:, i])] for i in kept]},
    }, maps


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
