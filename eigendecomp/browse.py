"""One HTML file in which people look at the directions of a decomposition: no server, no network, opens from disk.

Images, with what a class is called and what each image is::

    d.browse(images, "cnn_browse.html", names=fashion.CLASSES, labels=[fashion.CLASSES[y] for y in labels])

Text, inputs being token numbers; ``names`` says what an output is called and, unless ``tokens`` does, a token too::

    d.browse(windows, "stories_browse.html", names=stories.readable)

Anything else is a vector, shown as bars: ``d.browse(x, "tms_browse.html", features=[...], names=[...])``.

All that the page shows is computed here (:func:`collect`) and put in it as JSON; ``page/script.js`` draws it.
A sample's activation a is also split over the places where it arises (:func:`spatial_maps`): with the cotangent
c = S J u / a, the sum ⟨Jᵀc, u⟩ of the contributions of all places is a itself, and no reference is needed.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import torch
from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigendecomp import files
from eigendecomp.checks import real, whole
from eigendecomp.curvature import push_forward
from eigendecomp.data import Examples, Inputs, as_examples
from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence, KLDivergence, SquaredError
from eigendecomp.interaction import interactions
from eigendecomp.target import Target

Kind = Literal["text", "image", "vector"]
Names = Sequence[str] | Callable[[int], str]
Tokens = Sequence[Sequence[str]] | Callable[[int], str]

BINS = 40
LISTED = 8  # outputs, neighbours: how many are listed of each
BEFORE, AFTER = 32, 12  # tokens shown around a sample
WIDEST = 256  # numbers in a vector that can still be seen as bars
STEPS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # pushes, over the mean activation of the top samples
MEETING = 32  # examples on which interactions are measured
MEMORY = 1 << 28  # bytes for them at a time
EDGES, THUMBNAILS = (64, 48, 32, 24), 3 << 20  # pixels of a thumbnail: the most with which all stay under so many bytes
HEADS = re.compile(r"(?:^|\.)_?[Wb]_[QKVO]$")  # transformer-lens's names; heads along the first axis


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
    """Write a page to look at directions, and say where: one HTML file that needs nothing else.

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
    if by not in ("impact", "activation"):
        raise ValueError(f"by={by!r} must be 'impact' or 'activation'")
    whole("top", top)
    whole("middle", middle, 0)
    whole("references", references)
    for step in steps or ():
        real("steps", step)
    if threshold is not None:
        real("threshold", threshold, least=0)
    examples = as_examples(inputs)
    e, p, k = d.target.outputs(tuple(tensor[:1] for tensor in examples)).shape
    e = len(examples[0])
    name = namer(names, k)
    if labels is not None and len(labels) not in (e, e * p):
        raise ValueError(f"labels has {len(labels)} entries; give one for each of the {e} examples")
    shown = renderer(kind, examples[0], p, names=names, tokens=tokens, images=images, features=features)
    data = collect(d, examples, shown, name, labels, by, top, middle, steps, threshold, references, seed)
    write(path, render({"title": str(title), **data}))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of samples


class Renderer(Protocol):
    """How samples of one kind are put in the page."""

    kind: Kind

    def examples(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What the page needs to show these examples, and what they share."""
        ...

    def sample(self, e: int, p: int, strength: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        """What it needs for one sample beside its example; ``strength`` is that of all samples."""
        ...

    def about(self, e: int, p: int) -> str | None:
        """What to call a sample if it has no label."""
        ...


class Text:
    """Tokens, shaded by how strong the direction is at each."""

    kind: Kind = "text"

    def __init__(self, inputs: Tensor, p: int, tokens: Tokens | None, names: Names | None) -> None:
        if inputs.ndim != 2:
            raise ValueError(f"kind='text' shows inputs (examples, tokens), not {tuple(inputs.shape)}")
        length = inputs.shape[1]
        if p not in (1, length):
            raise ValueError(f"the model gives {p} outputs for {length} tokens; text has one for each, or one in all")
        if isinstance(tokens, Sequence) and not isinstance(tokens, str):
            if len(tokens) != len(inputs) or any(len(row) != length for row in tokens):
                raise ValueError(
                    f"tokens holds {len(tokens)} examples; give {len(inputs)} lists of {length} strings each, or a "
                    "function from a token's number to its string"
                )
            self.strings = [[str(token) for token in row] for row in tokens]
        else:
            if inputs.is_floating_point():
                raise ValueError(f"inputs are {inputs.dtype}, not token numbers; give tokens=[[string, ...], ...]")
            say: Any = names if tokens is None else tokens
            most = int(inputs.max())
            if say is None or not (callable(say) or len(say) > most):
                raise ValueError(
                    f"what token {most} is called is not known; give tokens= (a function from a token's number to its "
                    "string) or names= with one string for each token"
                )
            call = say if callable(say) else say.__getitem__
            called = {token: str(call(token)) for token in inputs.unique().tolist()}
            self.strings = [[called[token] for token in row] for row in inputs.tolist()]
        self.whole = p == 1

    def examples(self, numbers: Sequence[int]) -> dict[str, Any]:
        ids: dict[str, int] = {}
        rows = {e: [ids.setdefault(token, len(ids)) for token in self.strings[e]] for e in numbers}
        return {"examples": rows, "vocabulary": list(ids)}

    def sample(self, e: int, p: int, strength: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        if self.whole:
            return {"from": 0, "to": len(self.strings[e])}
        start, stop = max(0, p - BEFORE), min(len(self.strings[e]), p + AFTER + 1)
        shades = {name: plain(values[e, start:stop], 3) for name, values in strength.items()}
        return {"from": start, "to": stop, "shades": shades}

    def about(self, e: int, p: int) -> str | None:
        return None if self.whole else self.strings[e][p].strip() or self.strings[e][p]


class Images:
    """Thumbnails; where the outputs arise in them is drawn over them."""

    kind: Kind = "image"

    def __init__(self, inputs: Tensor, p: int, images: Tensor | None) -> None:
        shown = inputs if images is None else images
        if not isinstance(shown, Tensor) or len(shown) != len(inputs):
            raise ValueError(f"images must be a tensor of {len(inputs)} images, as many as there are examples")
        shown = shown.unsqueeze(1) if shown.ndim == 3 else shown
        if shown.ndim != 4 or shown.shape[1] not in (1, 3):
            raise ValueError(
                f"an image has 1 or 3 channels, as (examples, channels, height, width); {tuple(shown.shape)} is none. "
                "Give images= to show in their place"
            )
        if p != 1:
            raise ValueError(f"the model gives {p} outputs for an image; kind='image' shows models that give one")
        self.images = shown.detach().float().cpu()
        low, high = float(self.images.min()), float(self.images.max())
        self.low, self.high = (0.0, 1.0) if low >= 0 and 0.5 < high <= 1 else (low, max(high, low + 1e-12))

    def png(self, e: int, edge: int) -> str:
        """A data URI of a thumbnail, ``edge`` pixels long at most."""
        gray = (self.images[e] - self.low).div(self.high - self.low).clamp(0, 1).mul(255).round().byte()
        image = Image.fromarray(gray.permute(1, 2, 0).squeeze(2).numpy())
        if max(image.size) > edge:
            image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def examples(self, numbers: Sequence[int]) -> dict[str, Any]:
        made: dict[int, str] = {}
        for edge in EDGES:
            made = {e: self.png(e, edge) for e in numbers}
            if sum(map(len, made.values())) < THUMBNAILS:
                break
        return {"examples": made, "aspect": self.images.shape[3] / self.images.shape[2]}

    def sample(self, e: int, p: int, strength: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        return {}

    def about(self, e: int, p: int) -> str | None:
        return None


class Vectors:
    """Bars, one for each entry."""

    kind: Kind = "vector"

    def __init__(self, inputs: Tensor, p: int, features: Sequence[str] | None) -> None:
        rows = inputs.detach().double().cpu()
        rows = rows.unsqueeze(1) if rows.ndim == 1 else rows
        self.rows = rows.unsqueeze(1).expand(-1, p, -1) if rows.ndim == 2 else rows
        if self.rows.ndim != 3 or self.rows.shape[1] != p:
            raise ValueError(
                f"kind='vector' shows inputs (examples, numbers) or (examples, {p}, numbers), not {tuple(inputs.shape)}"
            )
        size = self.rows.shape[-1]
        if size > WIDEST:
            raise ValueError(f"a vector of {size} numbers cannot be seen as bars (at most {WIDEST}); use kind='image'")
        if features is not None and len(features) != size:
            raise ValueError(f"features has {len(features)} names; give one for each of the {size} entries")
        self.features = [str(i) for i in range(size)] if features is None else [str(name) for name in features]

    def examples(self, numbers: Sequence[int]) -> dict[str, Any]:
        rows = {e: plain(self.rows[e], 3) for e in numbers}
        return {"examples": rows, "features": self.features, "largest": plain(self.rows.abs().max())}

    def sample(self, e: int, p: int, strength: Mapping[str, Float[Tensor, "e p"]]) -> dict[str, Any]:
        return {}

    def about(self, e: int, p: int) -> str | None:
        row = self.rows[e, p].abs()
        return self.features[int(row.argmax())] if row.max() > 0 else None


def renderer(
    kind: Kind | None,
    inputs: Tensor,
    p: int,
    *,
    names: Names | None,
    tokens: Tokens | None,
    images: Tensor | None,
    features: Sequence[str] | None,
) -> Renderer:
    """The renderer asked for, or else the one that the inputs look like."""
    if kind is None:
        if tokens is not None or (not inputs.is_floating_point() and inputs.ndim == 2 and names is not None):
            kind = "text"
        elif images is not None or (inputs.ndim == 4 and inputs.shape[1] in (1, 3)):
            kind = "image"
        else:
            kind = "vector"
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} must be 'text', 'image' or 'vector'")
    if kind == "text":
        return Text(inputs, p, tokens, names)
    return Images(inputs, p, images) if kind == "image" else Vectors(inputs, p, features)


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
# What the page shows


def collect(
    d: Decomposition,
    examples: Examples,
    shown: Renderer,
    name: Callable[[int], str],
    labels: Sequence[str] | None,
    by: str,
    top: int,
    middle: int,
    steps: Sequence[float] | None,
    threshold: float | None,
    references: int,
    seed: int,
) -> dict[str, Any]:
    """Everything in the page, as plain values.

    The samples go through the model once for their activations, impacts and coefficients; beyond that, each direction
    through its own few samples.
    """
    e = len(examples[0])
    activation, impact = d.activation(examples), d.impact(examples, references, seed)
    z = d.encode(examples, seed)
    n, p = len(z), len(z) // e
    cut = threshold if threshold is not None else d.threshold
    cut = 0.1 * float(z.abs().max()) if cut is None else cut
    on = ((z.abs() >= cut) & (z != 0)).double().mean(0)
    energy = activation.double().square().mean(0)
    strength = {"impact": impact, "activation": activation}
    chosen = [pick(column, top, middle) for column in strength[by].T]
    meeting = met(d, examples, [rows[0] // p for rows, _ in chosen])
    k = d.target.outputs(tuple(tensor[:1] for tensor in examples)).shape[-1]
    tensors, heads = shares(d.decoder)

    def sample(v: int, row: int, group: str) -> dict[str, Any]:
        at = row // p, row % p
        column = {key: values[:, v].view(e, p) for key, values in strength.items()}
        label = None if labels is None else str(labels[at[0] if len(labels) == e else row])
        values = {key: plain(value[row, v]) for key, value in (*strength.items(), ("z", z))}
        return {"e": at[0], "p": at[1], "group": group, "label": label, **values, **shown.sample(*at, column)}

    directions = []
    for v in range(d.decoder.n):
        first, others = chosen[v]
        samples = [sample(v, row, "top") for row in first] + [sample(v, row, "middle") for row in others]
        if isinstance(shown, Images):
            maps = spatial_maps(d, v, tuple(tensor[first + others] for tensor in examples))
            for one, values in zip(samples, maps if maps is not None else (), strict=maps is not None):
                one["map"] = packed(values)
        about = [one["label"] or shown.about(one["e"], one["p"]) for one in samples[: len(first)]]
        weights = strength[by][first, v].tolist()
        directions.append({
            "about": common(about, weights),
            "alive": bool(on[v] > 0),
            "active": plain(on[v]),
            "curvature": plain(energy[v] / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)),
            "impact": plain(impact[:, v].max()),
            "activation": plain(activation[:, v].max()),
            "histograms": {key: histogram(values[:, v]) for key, values in strength.items()},
            "samples": samples,
            "tensors": [[key, plain(share)] for key, share in zip(d.decoder.shapes, tensors[v])],
            "heads": [[key, plain(value[v])] for key, value in heads.items()],
            "interactions": strongest(meeting[v], v),
            **moved(d, v, examples, first, name, steps, float(activation[first, v].mean())),
        })  # fmt: skip
    used = sorted({one["e"] for direction in directions for one in direction["samples"]})
    return {
        "kind": shown.kind, "by": by, "samples": n, "count": e, "positions": p, "outputs": k,
        "threshold": plain(cut), "references": 1 if d.settings.reference.fixed else references,
        "divergence": type(d.settings.divergence).__name__,
        "probabilities": isinstance(d.settings.divergence, KLDivergence),
        "directions": directions, **shown.examples(used),
    }  # fmt: skip


def pick(strength: Float[Tensor, " n"], top: int, middle: int) -> tuple[list[int], list[int]]:
    """The strongest samples, and of the others those nearest to evenly spaced levels between ¾ and ¼ of the largest."""
    order = strength.sort(descending=True, stable=True).indices
    first, rest = order[:top].tolist(), order[top:]
    found: list[int] = []
    for part in torch.linspace(0.75, 0.25, middle).tolist() if middle else ():
        if len(rest) == 0:
            break
        at = int((strength[rest] - part * strength.max()).abs().argmin())
        found.append(int(rest[at]))
        rest = torch.cat([rest[:at], rest[at + 1 :]])
    return first, sorted(found, key=lambda row: -float(strength[row]))


def histogram(values: Float[Tensor, " n"]) -> dict[str, Any]:
    """Counts in equal bins from zero to the largest value."""
    most = float(values.max())
    counts = torch.histc(values.float(), BINS, 0, most if most > 0 else 1.0)
    return {"most": plain(most), "counts": [int(count) for count in counts.tolist()]}


def common(about: Sequence[str | None], weights: Sequence[float]) -> list[str]:
    """What the top samples have in common, in order of the strength it comes with: three at most."""
    total: Counter[str] = Counter()
    for text, weight in zip(about, weights, strict=True):
        if text:
            total[text] += weight  # pyright: ignore[reportArgumentType]
    return [text for text, weight in total.most_common(3) if weight > 0.1 * sum(weights)]


def shares(u: Directions) -> tuple[list[list[float]], dict[str, Float[Tensor, "v heads"]]]:
    """Each direction's squared norm by tensor, and of the tensors that have heads by head."""
    tensors = u.norms(by_tensor=True).double().square()
    heads = {}
    for key, shape in u.shapes.items():
        if HEADS.search(key) and len(shape) == (3 if "W_" in key[-3:] else 2):
            parts = (u.select([v]).dense(key)[0] for v in range(u.n))  # one at a time: they may be large
            heads[key] = torch.stack([part.double().square().flatten(1).sum(1) for part in parts])
    return (tensors / tensors.sum(1, keepdim=True)).tolist(), heads


def met(d: Decomposition, examples: Examples, strongest: Sequence[int]) -> Float[Tensor, "v v"]:
    """Interactions over examples from which the directions' strongest samples come: some of them, evenly chosen."""
    some = sorted(set(strongest))
    some = some[:: math.ceil(len(some) / MEETING)]
    few = tuple(tensor[some] for tensor in examples)
    _, p, k = d.target.outputs(tuple(tensor[:1] for tensor in few)).shape
    each = p * k * d.decoder.n * torch.finfo(d.target.dtype).bits // 8
    return interactions(d, few, chunk=max(1, min(64, MEMORY // each)))


def strongest(row: Float[Tensor, " v"], v: int) -> list[list[Any]]:
    """The directions that one interacts with most, and how much."""
    order = [int(other) for other in row.abs().sort(descending=True, stable=True).indices if int(other) != v]
    return [[other, plain(row[other])] for other in order[:LISTED] if row[other] != 0]


@torch.no_grad()
def moved(
    d: Decomposition,
    v: int,
    examples: Examples,
    rows: Sequence[int],
    name: Callable[[int], str],
    steps: Sequence[float] | None,
    strength: float,
) -> dict[str, Any]:
    """What the direction does to the outputs of these samples: to first order, and pushed by several steps."""
    divergence = d.settings.divergence
    p = d.target.outputs(tuple(tensor[:1] for tensor in examples)).shape[1]
    few = sorted({row // p for row in rows})
    at = [few.index(row // p) * p + row % p for row in rows]
    part = tuple(tensor[few] for tensor in examples)
    y = first_order(d, v, part)[at]
    if isinstance(divergence, KLDivergence):  # logits have no zero: changes of log-probabilities
        y = y - (d.target.call(part).flatten(0, 1)[at].softmax(-1) * y).sum(-1, keepdim=True)
    mean = y.mean(0)
    size = min(LISTED, len(mean))
    up, down = mean.topk(size), (-mean).topk(size)
    reach = torch.stack([value.detach().double().square().sum() for value in d.target.chosen.values()]).sum().sqrt()
    unit = min(1 / strength, float(reach) / max(STEPS)) if strength > 0 else 0.0
    deltas = sorted({0.0, *(step * unit for step in STEPS)} if steps is None else {0.0, *map(float, steps)})
    outputs = []
    for delta in deltas:
        with d.perturbed({v: delta}):
            outputs.append(divergence.predict(d.target.call(part).flatten(0, 1)[at]).mean(0))
    lines = torch.stack(outputs).nan_to_num()  # what overflows is not drawn
    spread = lines.max(0).values - lines.min(0).values
    kept = spread.topk(min(6, len(spread))).indices.tolist()
    return {
        "promoted": [[name(int(i)), plain(value)] for value, i in zip(*up) if value > 0],
        "suppressed": [[name(int(i)), plain(-value)] for value, i in zip(*down) if value > 0],
        "push": {"steps": [plain(x) for x in deltas], "lines": [[name(i), plain(lines[:, i])] for i in kept]},
    }


def first_order(d: Decomposition, v: int, part: Examples) -> Float[Tensor, "n k"]:
    """J u of every sample for one direction."""
    return push_forward(d.target, SquaredError(), d.decoder.select([v]), part)[:, 0] / 2**0.5  # S = 2I


# ---------------------------------------------------------------------------------------------------------------------
# Where in an image


def spatial_maps(d: Decomposition, v: int, part: Examples) -> Float[Tensor, "e h w"] | None:
    """How much each place adds to the images' activations a: maps that add up to a; None without places.

    A module adds, at every place of its output, its output's change along u times what that change does later. Modules
    without places (a linear head) are left out, so their part is missing from the sum.
    """
    u = d.decoder.select([v])
    y = first_order(d, v, part)
    with torch.enable_grad():
        calls, f = recorded(d.target, part)
        if not calls:
            return None
        c = curvature_times(d.settings.divergence, f.detach(), y)
        c = c / (c * y).sum(-1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny).sqrt()
        back = torch.autograd.grad(f, [output for _, _, _, output in calls], c, allow_unused=True)
    maps = []
    for (module, names, arguments, _), g in zip(calls, back, strict=True):
        if g is None:
            continue
        tangents = {own: u.dense(full)[0].view_as(d.target.chosen[full]) for own, full in names.items()}
        values = {own: d.target.chosen[full].detach() for own, full in names.items()}

        def run(values: dict[str, Tensor], module: nn.Module = module, arguments: Any = arguments) -> Tensor:
            return torch.func.functional_call(module, values, arguments)

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            change = torch.func.jvp(run, (values,), (tangents,))[1]
        maps.append((g * change).sum(1))
    if not maps:
        return None
    finest = max((one.shape[1:] for one in maps), key=math.prod)
    sized = [F.interpolate(one[:, None], finest)[:, 0] * (one[0].numel() / math.prod(finest)) for one in maps]
    return torch.stack(sized).sum(0)


def curvature_times(divergence: Divergence, f: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """S y, as the gradient of ½‖S^½ y‖²."""
    leaf = y.detach().requires_grad_()
    return torch.autograd.grad(divergence.root(f, leaf).square().sum() / 2, leaf)[0]


def recorded(
    target: Target, part: Examples
) -> tuple[list[tuple[nn.Module, dict[str, str], Any, Tensor]], Float[Tensor, "n k"]]:
    """A run of the model: the modules with chosen parameters and places in their output, and the outputs.

    Of each its own names of these parameters beside the model's, its arguments, and its output.
    """
    calls, hooks = [], []
    for prefix, module in target.model.named_modules():
        full = {own: f"{prefix}.{own}" if prefix else own for own, _ in module.named_parameters(recurse=False)}
        names = {own: key for own, key in full.items() if key in target.chosen}

        def hook(module: nn.Module, arguments: Any, output: Any, names: dict[str, str] = names) -> Any:
            if not isinstance(output, Tensor) or output.ndim != 4:
                return output
            calls.append((module, names, tuple(one.detach() for one in arguments), output))
            return output.clone()  # what follows may write to it

        if names:
            hooks.append(module.register_forward_hook(hook))
    try:
        f = target.call(part).flatten(0, 1)
    finally:
        for handle in hooks:
            handle.remove()
    return calls, f


def packed(values: Float[Tensor, "h w"]) -> dict[str, Any]:
    """A map as signed bytes, over its largest entry."""
    most = float(values.abs().max())
    scaled = (values / most * 127).round().to(torch.int8) if most > 0 else torch.zeros_like(values, dtype=torch.int8)
    return {
        "height": values.shape[0], "width": values.shape[1], "most": plain(most), "sum": plain(values.sum()),
        "bytes": base64.b64encode(scaled.cpu().numpy().tobytes()).decode(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The file


def plain(value: Any, digits: int = 4) -> Any:
    """Numbers and lists of numbers, to a few significant digits."""
    if isinstance(value, Tensor):
        return plain(value.tolist(), digits)
    if isinstance(value, list):
        return [plain(item, digits) for item in value]
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def render(data: Mapping[str, Any]) -> str:
    """The page, with everything inside. Its rules let no script run but its own, and nothing be fetched."""
    pages = Environment(loader=PackageLoader("eigendecomp", "page"), autoescape=True, undefined=StrictUndefined)
    script, style = (cast(Any, pages.loader).get_source(pages, name)[0] for name in ("script.js", "style.css"))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":  # so that no text can end the element it stands in
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    return pages.get_template("page.html").render(
        title=data["title"], data=Markup(text), script=Markup(script), style=Markup(style),
        script_hash=hashes[0], style_hash=hashes[1],
    )  # fmt: skip


def write(path: Path, text: str) -> None:
    """Write atomically: a temporary file beside ``path``, renamed over it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own mode lets no one else read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
