"""One HTML file in which people look at the directions of a decomposition: no server, no network, opens from disk.

Images, with what a class is called and what each image is::

    d.browse(images, "cnn_browse.html", names=fashion.CLASSES, labels=[fashion.CLASSES[y] for y in labels])

Text, inputs being token numbers; ``names`` says what an output is called and, unless ``tokens`` does, a token too::

    d.browse(windows, "tinystories_browse.html", names=stories.readable)

Anything else is a vector, shown as bars: ``d.browse(x, "tms_browse.html", features=[...], names=[...])``.

All that the page shows is computed here (:func:`collect`) and put in it as JSON; ``page/script.js`` draws it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from eigendecomp.decomposition import Decomposition
from eigendecomp.divergence import KLDivergence
from eigendecomp.page.effects import effects
from eigendecomp.page.file import render
from eigendecomp.page.known import Known
from eigendecomp.page.measure import measure, single
from eigendecomp.page.places import spatial_maps
from eigendecomp.page.samples import Images, Kind, Names, Renderer, Tokens, plain, renderer
from eigendecomp.support import files
from eigendecomp.support.checks import real, whole
from eigendecomp.support.examples import Examples, Inputs, as_examples


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
    path, steps = files.writable(path), None if steps is None else tuple(steps)
    view = View(by, top, middle, steps, threshold, references, seed, progress)
    examples = as_examples(inputs)
    e, (p, k) = len(examples[0]), d.target.outputs(single(examples)).shape[1:]
    name = namer(names, k)
    if labels is not None and len(labels) not in (e, e * p):
        raise ValueError(f"labels has {len(labels)} entries; give one for each of the {e} examples")
    shown = renderer(kind, examples[0], p, names=names, tokens=tokens, images=images, features=features)
    files.replace(path, render({"title": str(title), **collect(d, examples, shown, name, labels, view)}).encode())
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
    known = Known(d, measured, shown, labels, (e, n // e), view.by, view.threshold, view.top, view.middle)
    mapped = isinstance(shown, Images)
    samples = torch.tensor([[*first, *others] if mapped else first for first, others in known.chosen])
    moved = effects(d, measured, examples, samples, len(known.chosen[0][0]), name, view.steps)
    directions = []
    bar = tqdm(moved, total=d.decoder.n, disable=not view.progress, desc="page: directions", leave=False)
    for v, (effect, y) in enumerate(bar):
        maps = None
        if mapped:
            some = tuple(tensor[samples[v].to(tensor.device)] for tensor in examples)
            maps = spatial_maps(d.target, d.settings.divergence, d.decoder.select([v]), some, y)
        directions.append(known.direction(v, effect, maps))
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
