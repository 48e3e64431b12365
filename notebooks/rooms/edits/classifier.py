"""Behaviours of the Fashion-MNIST network that edits take away: one class confused with another, one concept.

The edited weight is the last convolution. A confusion is a class's images on which the network leans to another class;
a concept's behaviour is what it calls the images of one class that have the concept, such as wide bags. Labelled
examples and validation images are halves of those that training held out; scores are of test images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.study import autoencoders, moves, readings
from eigendecomp.study.moves import Move, Probe, displaced
from eigendecomp.support.random import generator
from eigendecomp.target import Target
from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion import network as cnn
from rooms.edits import editors
from rooms.edits.edits import Behaviour, Bench, Score, log_probabilities
from rooms.fashion import concepts as fashion_concepts

Matrix = Float[Tensor, "in out"]
WEIGHT = "conv.weight"
LEANS, SAYS = 0.25, 0.5  # the least mass on the other class, and on the class that is to be said less
LEAST = 12  # images that show a behaviour, in each part
CONCEPTS = {  # the classes' images that have a concept
    "bag, open above": ("bag", "open_above"), "bag, wide": ("bag", "wide"), "dress, narrow": ("dress", "narrow"),
    "shirt, bright": ("shirt", "bright"), "trouser, split below": ("trouser", "split_below"),
    "ankle boot, textured": ("ankle boot", "textured"),
}  # fmt: skip
TUNING = ("bag, open above", "pullover as coat")  # hyperparameters are chosen on these, which are not scored
CHOICES = 3
RIDGES = (1e-2, 1e-1, 1.0, 10.0)
GRID: dict[str, list[dict[str, float]]] = {
    "one direction": [{"units": 50}, {"units": 100}],
    "one direction, whitened": [{"units": 100, "ridge": ridge} for ridge in RIDGES],
    "span of directions": [{"units": 100, "ridge": ridge} for ridge in (0.1, 1.0, 10.0)],
    "SAE unit, folded": [{"units": 100}],
    "SAE unit, regressed": [{"units": 100, "ridge": ridge} for ridge in RIDGES],
    "SAE unit, hook": [{"units": 100}],
    "one random row": [{"units": 100}],
    "gradient step": [{}],
    "gradient, rank 1": [{}],
    "K-FAC step": [{"ridge": ridge} for ridge in (0.1, 1.0, 10.0, 100.0)],
    "ROME-like": [{"ridge": ridge} for ridge in RIDGES],
    "LoRA, rank 1, Fisher": [{"penalty": penalty} for penalty in (0.1, 1.0)],
    "LoRA, rank 1, KL": [{"held": held} for held in (1.0, 10.0, 100.0)],
}
HOOK = "SAE unit, hook"


class Last(nn.Module):
    """The network from its last convolution on: what enters it and what skips it, each (n, c, 7, 7), to logits."""

    def __init__(self, model: cnn.FashionCNN) -> None:
        super().__init__()
        self.conv, self.bn, self.head = model.block3.conv2, model.block3.bn2, model.head
        self.eval()

    def forward(self, hidden: Float[Tensor, "n c 7 7"], skip: Float[Tensor, "n c 7 7"]) -> Float[Tensor, "n 10"]:
        return self.head(torch.relu(skip + self.bn(self.conv(hidden))).mean(dim=(2, 3)))


@torch.no_grad()
def entering(model: cnn.FashionCNN, images: Float[Tensor, "n 1 28 28"]) -> tuple[Tensor, Tensor]:
    """What enters the last convolution and what skips it."""
    parts = []
    for some in images.split(500):
        x = model.down2(model.block2(model.enter(some)))
        parts.append((model.block3.relu1(model.block3.bn1(model.block3.conv1(x))), x))
    hidden, skip = (torch.cat(each) for each in zip(*parts, strict=True))
    return hidden, skip


@dataclass
class Part:
    """Some images: what enters the last convolution, the bench, and every behaviour that they show."""

    inputs: tuple[Tensor, Tensor]
    bench: Bench
    shown: dict[str, Behaviour]


@dataclass
class Shop:
    """The network and what edits of its last convolution share; fits depend on the seed."""

    seed: int
    fit_images: int = 400
    held: int = 5000  # of the images that training held out: half for examples, half for validation
    test: int = 5000
    damaged: int = 1500  # images of a part on which damage is measured, beside all that show a behaviour
    steps: int = 500
    sae_steps: int = 1000
    subset: bool = False

    def __post_init__(self) -> None:
        self.model = cnn.load_model()
        self.tail = Last(self.model)
        x, y = fashion.load("train", subset=self.subset)
        learned, held = cnn.split_indices(len(x), len(x) // 12, seed=0)
        self.fitted = entering(self.model, x[learned[: self.fit_images]])
        examples, validation = held[: self.held].chunk(2)
        tests = fashion.load("test", subset=self.subset)
        self.parts = {
            "examples": self.part(x[examples], y[examples]),
            "validation": self.part(x[validation], y[validation]),
            "test": self.part(tests[0][: self.test], tests[1][: self.test]),
        }
        parts = self.parts.values()
        self.names = [n for n in self.parts["test"].shown if all(int(p.shown[n].on.sum()) >= LEAST for p in parts)]

    def part(self, images: Tensor, labels: Tensor) -> Part:
        """Images with what they show; of those that show nothing only some are kept."""
        inputs = entering(self.model, images)
        p = cnn.predict(_Paired(self.tail), torch.stack(inputs, 1)).softmax(-1)
        told = fashion_concepts.classes(labels) | fashion_concepts.concepts(images, labels)
        shown = behaviours(p, labels, told)
        keep = torch.stack([one.on for one in shown.values()]).any(0)
        keep[: self.damaged] = True
        few = (inputs[0][keep], inputs[1][keep])
        bench = Bench(
            Probe(self.tail, few, log_probabilities), p[keep].argmax(1), torch.stack(list(told.values()), 1)[keep]
        )
        return Part(few, bench, {name: Behaviour(name, one.on[keep], one.members) for name, one in shown.items()})

    def reseeded(self, seed: int) -> Shop:
        """The same images, with fits of another seed."""
        _ = self.site
        other = copy.copy(self)
        other.__dict__.pop("_made", None)
        other.seed = seed
        return other

    @property
    def weight(self) -> Matrix:
        return self.tail.conv.weight.detach().flatten(1).mT

    @cached_property
    def site(self) -> editors.Site:
        """What arrives at the convolution's patches, and what draws of the network's own outputs ask there."""
        found = readings.factors(
            self.tail, self.fitted, divergence=ed.KLDivergence(), reference=ed.ModelSample(), parameters=[WEIGHT]
        )
        return editors.Site(*found[WEIGHT])

    def fisher(self, rows: editors.Rows) -> Float[Tensor, "v v"]:
        """E[zzᵀ] in the rows' span, an image's z being the sum over its patches."""
        z = (self.site.x @ rows.readers.mT) * (self.site.asked @ rows.writers.mT)
        z = z.unflatten(0, (len(self.fitted[0]), -1)).sum(1)
        return z.mT @ z / len(z)

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is made when it is first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def rows(self, kind: str, n: int, ridge: float = 0.0) -> tuple[editors.Rows, Float[Tensor, "v v"]]:
        """Rows of rank one, and their Fisher matrix."""

        def make() -> tuple[editors.Rows, Tensor]:
            rows = {
                "directions": self._directions, "random": self._random, "folded": self._folded,
                "whitened": lambda n: editors.whitened_readers(self.rows("directions", n)[0], self.site, ridge),
                "regressed": lambda n: self._regressed(n, ridge),
            }[kind](n)  # fmt: skip
            return rows, self.fisher(rows)

        return self.once((kind, n, ridge), make)

    def _directions(self, n: int) -> editors.Rows:
        d = ed.decompose(
            self.tail, self.fitted, divergence=ed.KLDivergence(), parameters=[WEIGHT], n_directions=n,
            group={WEIGHT: "o i h w -> o (i h w)"}, sparsity=ed.BatchTopK(4 / n), steps=self.steps, batch_size=128,
            learning_rate=1e-2, seed=self.seed, progress=False,
        )  # fmt: skip
        few = tuple(part[:3] for part in self.fitted)
        reader, writer = (side(d, few, "decoder")[WEIGHT][:, 0] for side in (readings.readers, readings.writers))
        return editors.Rows(reader, writer)

    def _random(self, n: int) -> editors.Rows:
        draw = torch.Generator().manual_seed(self.seed)
        return editors.Rows(*(torch.randn(n, k, generator=draw) for k in self.weight.shape))

    def autoencoder(self, n: int) -> autoencoders.Autoencoder:
        """An autoencoder of what the convolution gives, position by position."""
        y = self.site.x @ self.weight
        return self.once(("sae", n), lambda: autoencoders.train(y, n, 4.0, seed=self.seed, steps=self.sae_steps))

    def _folded(self, n: int) -> editors.Rows:
        """Units as changes of the weight before them: what W makes of a patch, as the unit reads it, ⊗ its row."""
        sae = self.autoencoder(n)
        return editors.Rows((self.weight @ sae.sae.W_enc.detach()).mT, sae.decoder)

    def _regressed(self, n: int, ridge: float) -> editors.Rows:
        sae = self.autoencoder(n)
        z = sae.encode(self.site.x @ self.weight)
        return editors.whitened_readers(editors.Rows(z.mT @ self.site.x, sae.decoder), self.site, ridge)


class _Paired(nn.Module):
    """The tail on its two inputs stacked."""

    def __init__(self, tail: Last) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, both: Float[Tensor, "n 2 c 7 7"]) -> Float[Tensor, "n 10"]:
        return self.tail(both[:, 0], both[:, 1])


def behaviours(
    p: Float[Tensor, "n 10"], labels: Tensor, told: Mapping[str, Bool[Tensor, " n"]]
) -> dict[str, Behaviour]:
    """All confusions of two classes, and the concepts', by name."""
    found, classes = {}, fashion.CLASSES
    for a, true in enumerate(classes):
        for b, other in enumerate(classes):
            if a != b:
                name, members = f"{true} as {other}", torch.arange(len(classes)) == b
                found[name] = Behaviour(name, (labels == a) & (p[:, b] >= LEANS), members)
    for name, (kind, concept) in CONCEPTS.items():
        members = torch.arange(len(classes)) == classes.index(kind)
        found[name] = Behaviour(name, told[concept] & (p[:, members].sum(1) >= SAYS), members)
    return found


@dataclass
class Task:
    """A behaviour and n labelled examples of it."""

    shop: Shop
    name: str
    n: int

    @cached_property
    def index(self) -> Tensor:
        on = self.shop.parts["examples"].shown[self.name].on.nonzero()[:, 0]
        return on[torch.randperm(len(on), generator=generator(self.shop.seed, f"examples {self.name}"))[: self.n]]

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        hidden, skip = self.shop.parts["examples"].inputs
        return hidden[self.index], skip[self.index]

    def loss(self, f: Float[Tensor, "n 10"]) -> Tensor:
        """The mean log mass of the members."""
        members = self.shop.parts["examples"].shown[self.name].members
        return f[: len(self.index)].log_softmax(-1)[:, members].logsumexp(-1).mean()

    @cached_property
    def gradient(self) -> Matrix:
        """G of the log mass, at unit norm."""
        found = moves.gradient(self.shop.tail, self.inputs, self.loss, [WEIGHT])[WEIGHT]
        return -found.flatten(1).mT

    def score(self, split: str, move: Move, **search: float) -> Score | None:
        """At the step that halves the mass on the part's images."""
        part = self.shop.parts[split]
        return part.bench.score(move, part.shown[self.name], **search)

    def move(self, change: Matrix) -> Move:
        """At unit norm."""
        kernel = self.shop.tail.conv.weight
        return displaced(self.shop.tail, {WEIGHT: (change / change.norm()).mT.reshape(kernel.shape)})


def best(task: Task, tried: list[Move], **search: float) -> Move | None:
    """The move that costs least on validation images; None where none halves the mass."""
    scores = [task.score("validation", move, **search) for move in tried]
    reached = [(score.damage, i) for i, score in enumerate(scores) if score is not None]
    return tried[min(reached)[1]] if reached else None


def row(task: Task, kind: str, n: int, ridge: float = 0.0) -> Move | None:
    """Of the most promising rows the best on validation images."""
    rows, fisher = task.shop.rows(kind, n, ridge)
    numbers = editors.candidates(task.gradient, rows, fisher, CHOICES).tolist()
    return best(task, [task.move(editors.along_row(task.gradient, rows, number)) for number in numbers])


def hooked(task: Task, n: int) -> Move | None:
    """Of the units that are on most in the examples beyond other images, the best to scale by a hook."""
    sae, tail = task.shop.autoencoder(n), task.shop.tail
    with torch.no_grad():
        here = sae.encode(tail.conv(task.inputs[0]).movedim(1, -1).flatten(0, 2)).mean(0)
    beyond = here - sae.encode(task.shop.site.x @ task.shop.weight).mean(0)

    def scaled(unit: int) -> Move:
        return lambda delta: sae.steered(tail, "conv", {unit: -delta}, how="scale", axis=1)

    return best(task, [scaled(unit) for unit in beyond.topk(CHOICES).indices.tolist()], largest=20.0)


def adapted(task: Task, penalty: float = 0.0, held: float = 0.0) -> Matrix:
    """A rank-one change trained on the examples until their mass is halved, with a Fisher penalty or held to others."""
    shop, size = task.shop, len(task.index)
    others = tuple(part[:100] for part in shop.fitted)
    inputs = tuple(torch.cat(pair) for pair in zip(task.inputs, others, strict=True)) if held else task.inputs
    with torch.no_grad():
        start, base = task.loss(shop.tail(*task.inputs)).item(), shop.tail(*others).log_softmax(-1)

    def loss(f: Float[Tensor, "n 10"]) -> Tensor:
        kl = (base.exp() * (base - f[size:].log_softmax(-1))).sum(-1).mean() if held else 0.0
        return task.loss(f) + held * kl

    matrix = Flat(shop.tail)
    change = editors.learned(
        Target(matrix, ["weight"]), inputs, loss, until=start - 0.7, steps=40, learning_rate=3e-2, penalty=penalty,
        fisher=shop.site.diagonal.mT if penalty else None, seed=shop.seed,
        writer=torch.linalg.svd(task.gradient, full_matrices=False).U[:, 0],
    ).change["weight"]  # fmt: skip
    return change.mT


class Flat(nn.Module):
    """The tail with the convolution's kernel written as a matrix, (out, in · 3 · 3)."""

    def __init__(self, tail: Last) -> None:
        super().__init__()
        self.weight = nn.Parameter(tail.conv.weight.detach().flatten(1).clone())
        self.tail = (tail,)  # not a submodule: its parameters are not this module's

    def forward(self, hidden: Tensor, skip: Tensor) -> Tensor:
        (tail,) = self.tail
        kernel = self.weight.view_as(tail.conv.weight)
        y = tail.bn(nn.functional.conv2d(hidden, kernel, padding=1))
        return tail.head(torch.relu(skip + y).mean(dim=(2, 3)))


def move_of(task: Task, method: str, **s: float) -> Move | None:
    """What a method makes of the examples."""
    g, site, n = task.gradient, task.shop.site, int(s.get("units", 0))
    kinds = {"one direction": "directions", "one direction, whitened": "whitened", "SAE unit, folded": "folded",
             "SAE unit, regressed": "regressed", "one random row": "random"}  # fmt: skip
    if method in kinds:
        return row(task, kinds[method], n, s.get("ridge", 0.0))
    if method == HOOK:
        return hooked(task, n)
    key = nn.functional.unfold(task.inputs[0], 3, padding=1).mean((0, 2))
    ways: dict[str, Callable[[], Tensor]] = {
        "span of directions": lambda: editors.natural(g, *task.shop.rows("directions", n), s["ridge"]),
        "gradient step": lambda: -g,
        "gradient, rank 1": lambda: editors.rank_one(g),
        "K-FAC step": lambda: editors.whitened(g, site, s["ridge"]),
        "ROME-like": lambda: editors.rome(g, key, site, s["ridge"]),
        "LoRA, rank 1, Fisher": lambda: adapted(task, penalty=s["penalty"]),
        "LoRA, rank 1, KL": lambda: adapted(task, held=s["held"]),
    }
    change = ways[method]()
    return task.move(change) if change.norm() > 0 else None


def one(task: Task, method: str, split: str, **setting: float) -> dict[str, Any]:
    """A row of the table. Scores are None where the mass is never halved."""
    start = time.process_time()
    move = move_of(task, method, **setting)
    seconds, search = time.process_time() - start, {"largest": 20.0} if method == HOOK else {}
    score = move and task.score(split, move, **search)
    inside, out = task.shop.weight.shape
    dense = method in ("span of directions", "gradient step", "K-FAC step")
    size = inside * out if dense else 2 * out + 2 if method == HOOK else inside + out
    found: dict[str, Any] = {"behaviour": task.name, "method": method, "examples": task.n, "seed": task.shop.seed}
    found |= {"seconds": seconds, "bytes": 4 * size}
    return found | (dict.fromkeys(Score.__dataclass_fields__) if score is None else asdict(score))


def tuned(shop: Shop, n: int) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Settings with the least geometric mean damage on validation images over the tuning behaviours, and all tried."""
    settings, tried = {}, []
    tasks = [Task(shop, name, n) for name in TUNING if name in shop.names]
    for method, grid in GRID.items():
        costs = []
        for setting in grid:
            damages = [one(task, method, "validation", **setting)["damage"] for task in tasks] if len(grid) > 1 else []
            reached = all(value is not None for value in damages)
            costs.append(torch.tensor(damages).log().mean().exp().item() if reached else float("inf"))
            if len(grid) > 1:
                tried.append({"method": method, **setting, "damage": costs[-1] if reached else None})
        settings[method] = grid[costs.index(min(costs))] if len(grid) > 1 else grid[0]
    return settings, tried


def scored(shop: Shop) -> Iterator[str]:
    """The behaviours that are scored."""
    return (name for name in shop.names if name not in TUNING)
