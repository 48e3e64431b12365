"""Behaviours of the Fashion-MNIST network that edits take away: one class confused with another, one concept.

The edited weight is the last layer's, on pooled features written with mean 0 and deviation 1. A confusion is a class's
images on which the network leans to another class; a concept's behaviour is what it calls the images of one class that
have the concept, such as wide bags. Labelled examples and validation images are halves of those that training held out;
scores are of test images.
"""

from __future__ import annotations

import copy
import math
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
WEIGHT = "weight"
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
    "one direction": [{"units": 30}, {"units": 100}],
    "one direction, whitened": [{"units": 100, "ridge": ridge} for ridge in RIDGES],
    "span of directions": [{"units": 100, "ridge": ridge} for ridge in (0.1, 1.0, 10.0)],
    "SAE unit, folded": [{"units": 30}, {"units": 100}],
    "SAE unit, regressed": [{"units": 100, "ridge": ridge} for ridge in RIDGES],
    "SAE unit, hook": [{"units": 30}, {"units": 100}],
    "one random row": [{"units": 100}],
    "gradient step": [{}],
    "gradient, rank 1": [{}],
    "K-FAC step": [{"ridge": ridge} for ridge in (0.1, 1.0, 10.0, 100.0)],
    "ROME-like": [{"ridge": ridge} for ridge in RIDGES],
    "LoRA, rank 1": [{"learning_rate": rate} for rate in (0.01, 0.03, 0.1)],
    "LoRA, rank 1, Fisher": [{"penalty": penalty} for penalty in (0.01, 0.1, 1.0)],
    "LoRA, rank 1, KL": [{"held": held} for held in (1.0, 10.0, 100.0)],
}
HOOK = "SAE unit, hook"


class Head(nn.Module):
    """The last layer: pooled features (n, 64), of mean 0 and deviation 1, to logits; hooks act at ``here``."""

    def __init__(self, head: nn.Linear, mean: Float[Tensor, " d"], deviation: Float[Tensor, " d"]) -> None:
        super().__init__()
        self.here = nn.Identity()
        self.weight = nn.Parameter((head.weight * deviation).detach())
        self.register_buffer("bias", (head.bias + head.weight @ mean).detach())

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n 10"]:
        return nn.functional.linear(self.here(x), self.weight, self.bias)  # type: ignore[arg-type]


@torch.no_grad()
def pooled(model: cnn.FashionCNN, images: Float[Tensor, "n 1 28 28"]) -> Float[Tensor, "n d"]:
    """What enters the last layer."""
    parts = [model.block3(model.down2(model.block2(model.enter(some)))).mean((2, 3)) for some in images.split(500)]
    return torch.cat(parts)


@dataclass
class Part:
    """Some images: their features, the bench, and every behaviour that they show."""

    x: Float[Tensor, "n d"]
    bench: Bench
    shown: dict[str, Behaviour]


@dataclass
class Shop:
    """The network's last layer and what edits of it share; fits depend on the seed."""

    seed: int
    fit_images: int = 3000
    held: int = 5000  # of the images that training held out: half for examples, half for validation
    test: int = 6000
    steps: int = 600
    sae_steps: int = 600
    subset: bool = False

    def __post_init__(self) -> None:
        model = cnn.load_model()
        x, y = fashion.load("train", subset=self.subset)
        learned, held = cnn.split_indices(len(x), len(x) // 12, seed=0)
        fitted = pooled(model, x[learned[: self.fit_images]])
        self.mean, self.deviation = fitted.mean(0), fitted.std(0).clamp_min(1e-6)
        self.tail = Head(model.head, self.mean, self.deviation)
        self.fitted = (fitted - self.mean) / self.deviation
        examples, validation = held[: self.held].chunk(2)
        tests = fashion.load("test", subset=self.subset)
        self.parts = {
            "examples": self.part(model, x[examples], y[examples]),
            "validation": self.part(model, x[validation], y[validation]),
            "test": self.part(model, tests[0][: self.test], tests[1][: self.test]),
        }
        parts = self.parts.values()
        self.names = [n for n in self.parts["test"].shown if all(int(p.shown[n].on.sum()) >= LEAST for p in parts)]

    @torch.no_grad()
    def part(self, model: cnn.FashionCNN, images: Tensor, labels: Tensor) -> Part:
        """Images with what they show."""
        x = (pooled(model, images) - self.mean) / self.deviation
        p = self.tail(x).softmax(-1)
        told = fashion_concepts.classes(labels) | fashion_concepts.concepts(images, labels)
        bench = Bench(Probe(self.tail, x, log_probabilities), p.argmax(1), torch.stack(list(told.values()), 1))
        return Part(x, bench, behaviours(p, labels, told))

    def reseeded(self, seed: int) -> Shop:
        """The same images, with fits of another seed."""
        _ = self.site
        other = copy.copy(self)
        other.__dict__.pop("_made", None)
        other.seed = seed
        return other

    @property
    def weight(self) -> Matrix:
        return self.tail.weight.detach().mT

    @cached_property
    def site(self) -> editors.Site:
        """What arrives at the weight, and what draws of the network's own outputs ask there."""
        factors = readings.factors(
            self.tail, self.fitted, divergence=ed.KLDivergence(), reference=ed.ModelSample(), parameters=[WEIGHT]
        )
        return editors.Site(*factors[WEIGHT])

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
            return rows, rows.fisher(self.site)

        return self.once((kind, n, ridge), make)

    def _directions(self, n: int) -> editors.Rows:
        d = ed.decompose(
            self.tail, self.fitted, divergence=ed.KLDivergence(), parameters=[WEIGHT], n_directions=n,
            sparsity=ed.BatchTopK(2 / n), steps=self.steps, batch_size=256, learning_rate=1e-2, seed=self.seed,
            progress=False,
        )  # fmt: skip
        few = self.fitted[:3]
        reader, writer = (side(d, few, "decoder")[WEIGHT][:, 0] for side in (readings.readers, readings.writers))
        return editors.Rows(reader, writer)

    def _random(self, n: int) -> editors.Rows:
        draw = torch.Generator().manual_seed(self.seed)
        return editors.Rows(*(torch.randn(n, k, generator=draw) for k in self.weight.shape))

    def autoencoder(self, n: int) -> autoencoders.Autoencoder:
        """An autoencoder of the features."""
        x = self.fitted
        return self.once(("sae", n), lambda: autoencoders.train(x, n, 2.0, seed=self.seed, steps=self.sae_steps))

    def _folded(self, n: int) -> editors.Rows:
        sae = self.autoencoder(n)
        return editors.folded(sae.sae.W_enc.detach().mT, sae.decoder, self.weight)

    def _regressed(self, n: int, ridge: float) -> editors.Rows:
        sae = self.autoencoder(n)
        return editors.regressed(sae.encode(self.site.x), sae.decoder, self.weight, self.site, ridge)


def behaviours(
    p: Float[Tensor, "n 10"], labels: Tensor, told: Mapping[str, Bool[Tensor, " n"]]
) -> dict[str, Behaviour]:
    """All confusions of two classes, and the concepts', by name."""
    behaviours, classes = {}, fashion.CLASSES
    for a, true in enumerate(classes):
        for b, other in enumerate(classes):
            if a != b:
                name, members = f"{true} as {other}", torch.arange(len(classes)) == b
                behaviours[name] = Behaviour(name, (labels == a) & (p[:, b] >= LEANS), members)
    for name, (kind, concept) in CONCEPTS.items():
        members = torch.arange(len(classes)) == classes.index(kind)
        behaviours[name] = Behaviour(name, told[concept] & (p[:, members].sum(1) >= SAYS), members)
    return behaviours


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

    @property
    def x(self) -> Float[Tensor, "n d"]:
        return self.shop.parts["examples"].x[self.index]

    def loss(self, f: Float[Tensor, "n 10"]) -> Tensor:
        """The mean log mass of the members."""
        members = self.shop.parts["examples"].shown[self.name].members
        return f[: len(self.index)].log_softmax(-1)[:, members].logsumexp(-1).mean()

    @cached_property
    def gradient(self) -> Matrix:
        """G of the log mass, at unit norm."""
        gradient = moves.gradient(self.shop.tail, self.x.unsqueeze(1), self.loss, [WEIGHT])[WEIGHT]
        return -gradient.mT

    def score(self, split: str, move: Move, **search: float) -> Score | None:
        """At the step that halves the mass on the part's images."""
        part = self.shop.parts[split]
        return part.bench.score(move, part.shown[self.name], **search)

    def move(self, change: Matrix) -> Move:
        """At unit norm."""
        return displaced(self.shop.tail, {WEIGHT: (change / change.norm()).mT})


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
    sae = task.shop.autoencoder(n)
    beyond = sae.encode(task.x).mean(0) - sae.encode(task.shop.fitted).mean(0)

    def scaled(unit: int) -> Move:
        return lambda delta: sae.steered(task.shop.tail, "here", {unit: -delta}, how="scale")

    return best(task, [scaled(unit) for unit in beyond.topk(CHOICES).indices.tolist()], largest=20.0)


def adapted(task: Task, penalty: float = 0.0, held: float = 0.0, learning_rate: float = 3e-2) -> Matrix:
    """A rank-one change trained on the examples until their mass is halved, with a Fisher penalty or held to others."""
    shop, size, others = task.shop, len(task.index), task.shop.fitted[:500]
    inputs = torch.cat([task.x, others]) if held else task.x
    with torch.no_grad():
        start, base = task.loss(shop.tail(task.x)).item(), shop.tail(others).log_softmax(-1)

    def loss(f: Float[Tensor, "n 10"]) -> Tensor:
        kl = (base.exp() * (base - f[size:].log_softmax(-1))).sum(-1).mean() if held else 0.0
        return task.loss(f) + held * kl

    return editors.learned(
        Target(shop.tail, [WEIGHT]), inputs.unsqueeze(1), loss, until=start + math.log(0.5), steps=100,
        learning_rate=learning_rate, penalty=penalty, fisher=shop.site.diagonal.mT if penalty else None, seed=shop.seed,
        writer=torch.linalg.svd(task.gradient, full_matrices=False).U[:, 0],
    ).change[WEIGHT].mT  # fmt: skip


def move_of(task: Task, method: str, **s: float) -> Move | None:
    """What a method makes of the examples."""
    g, site, n = task.gradient, task.shop.site, int(s.get("units", 0))
    kinds = {"one direction": "directions", "one direction, whitened": "whitened", "SAE unit, folded": "folded",
             "SAE unit, regressed": "regressed", "one random row": "random"}  # fmt: skip
    if method in kinds:
        return row(task, kinds[method], n, s.get("ridge", 0.0))
    if method == HOOK:
        return hooked(task, n)
    ways: dict[str, Callable[[], Tensor]] = {
        "span of directions": lambda: editors.natural(g, *task.shop.rows("directions", n), s["ridge"]),
        "gradient step": lambda: -g,
        "gradient, rank 1": lambda: editors.rank_one(g),
        "K-FAC step": lambda: editors.whitened(g, site, s["ridge"]),
        "ROME-like": lambda: editors.rome(g, task.x.mean(0), site, s["ridge"]),
        "LoRA, rank 1": lambda: adapted(task, **s),
        "LoRA, rank 1, Fisher": lambda: adapted(task, **s),
        "LoRA, rank 1, KL": lambda: adapted(task, **s),
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
    row: dict[str, Any] = {"behaviour": task.name, "method": method, "examples": task.n, "seed": task.shop.seed}
    row |= {"seconds": seconds, "bytes": 4 * size}
    return row | (dict.fromkeys(Score.__dataclass_fields__) if score is None else asdict(score))


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
