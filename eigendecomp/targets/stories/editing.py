"""The benchmark of edits on the story model: one MLP weight of a block, edited in many ways to lose behaviours.

All edits are of the same weight, ``blocks.L.mlp.W_in`` of the model written with standard inputs, and are made from the
same labelled examples: training samples that show the behaviour. What methods differ in is the change. Units are chosen
on validation stories and settings on two behaviours that are not scored; scores are of test stories.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.study import autoencoders, editors, positions, readings
from eigendecomp.study.edits import Behaviour, Bench, Score, log_probabilities
from eigendecomp.study.moves import Move, Probe, displaced, gradient
from eigendecomp.support.examples import as_examples
from eigendecomp.support.random import generator
from eigendecomp.target import Target
from eigendecomp.targets.stories import behaviours, concepts
from eigendecomp.targets.stories import model as stories

SCORES = ("step", "left", "damage", "worst", "same_words")
CHOICES = 3  # rows of a dictionary that are tried on validation stories
DICTIONARIES = {"directions": "one direction", "autoencoder": "SAE unit, folded", "random": "one random row"}
# What is tried for each method on the tuning behaviours.
GRID: dict[str, list[dict[str, float]]] = {
    "several directions": [{"k": 3}, {"k": 10}, {"k": 30}],
    "span of directions": [{"ridge": 1e-2}, {"ridge": 1e-1}, {"ridge": 1.0}],
    "ROME-like": [{"ridge": 1e-3}, {"ridge": 1e-2}, {"ridge": 1e-1}, {"ridge": 1.0}],
    "K-FAC step": [{"ridge": 1e-2}, {"ridge": 1e-1}, {"ridge": 1.0}],
    "gradient step": [{}],
    "gradient, rank 1": [{}],
    "LoRA, rank 1": [{"learning_rate": 1e-2}, {"learning_rate": 3e-2}, {"learning_rate": 1e-1}],
    "LoRA, rank 1, Fisher": [
        {"learning_rate": 3e-2, "penalty": 0.1}, {"learning_rate": 3e-2, "penalty": 1.0},
        {"learning_rate": 3e-2, "penalty": 10.0},
    ],
}  # fmt: skip


class Tail(nn.Module):
    """A ``HookedTransformer`` from one block on, as a module whose input is what enters the block."""

    def __init__(self, inner: nn.Module, layer: int) -> None:
        super().__init__()
        self.inner, self.layer = inner, layer

    def stream(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """The residual stream after the last block."""
        inner = cast(Any, self.inner)
        return inner(x, start_at_layer=self.layer, stop_at_layer=inner.cfg.n_layers)

    def logits(self, stream: Float[Tensor, "n t d"]) -> Float[Tensor, "n t k"]:
        """What the model makes of that."""
        inner = cast(Any, self.inner)
        return inner.unembed(inner.ln_final(stream))

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t k"]:
        return self.logits(self.stream(x))


@dataclass
class TailProbe(Probe):
    """A probe of a :class:`Tail` that makes the outputs of those samples alone that count."""

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Float[Tensor, "n k"]:
        assert isinstance(model, Tail)
        stream = model.stream(*as_examples(self.inputs)).flatten(0, 1)
        some = stream if self.samples is None else stream[self.samples]
        return self.view(model.logits(some.unsqueeze(0)).squeeze(0))


@dataclass
class Held:
    """Stories that were held out: what enters the block, the bench, and the behaviours that they show."""

    bench: Bench
    scored: dict[str, Behaviour]


@dataclass
class Examples:
    """Labelled examples: what enters the block in their windows, the samples that show the behaviour, what arrived."""

    entering: Float[Tensor, "e t d"]
    samples: Int[Tensor, " e"]
    members: Bool[Tensor, " k"]
    met: Float[Tensor, "e d"]

    def loss(self, f: Float[Tensor, "n k"]) -> Tensor:
        """The mean log mass of the members."""
        logp = f[self.samples].log_softmax(-1)
        return logp[:, self.members].logsumexp(-1).mean()


@dataclass
class Workshop:
    """The model, its stories, and what is shared by all edits of one weight; fits depend on the seed."""

    layer: int
    seed: int = 0
    units: Sequence[int] = (100, 300)  # sizes of dictionaries to choose from
    fit_windows: int = 500
    held_windows: int = 112
    length: int = 32
    steps: int = 700
    sae_steps: int = 1200
    seconds: dict[str, float] = field(default_factory=dict)  # of the fits that many edits share

    def __post_init__(self) -> None:
        shipped = stories.load_model()
        self.rules = concepts.Rules(stories.load_tokenizer())
        counts: dict[stories.Split, int] = {
            "train": self.fit_windows, "validation": self.held_windows, "test": self.held_windows
        }  # fmt: skip
        self.tokens: dict[str, Tensor] = {
            split: stories.token_windows(stories.load_stories(split), n, self.length, seed=0, at_start=0.1)
            for split, n in counts.items()
        }
        self.model = stories.standardised(shipped, [self.layer], self.tokens["train"][:500])
        self.tail = Tail(self.model, self.layer)
        self.weight, self.site_name = f"blocks.{self.layer}.mlp.W_in", f"blocks.{self.layer}.ln2"
        self.parameter = f"inner.{self.weight}"
        with torch.no_grad():
            self.entering = {k: cast(Any, self.model)(t, stop_at_layer=self.layer) for k, t in self.tokens.items()}
        self.held = {split: self._held(split) for split in ("validation", "test")}

    @torch.no_grad()
    def _held(self, split: str) -> Held:
        tokens, x = self.tokens[split], self.entering[split]
        probe = TailProbe(self.tail, x, log_probabilities)
        told = self.rules(tokens, probe.base.unflatten(0, tokens.shape))
        named = behaviours.SCORED | behaviours.TUNING
        found = behaviours.behaviours(self.rules, probe.base, named)
        return Held(Bench(probe, tokens.flatten(), told.truth), {one.name: one for one in found})

    def reseeded(self, seed: int, units: Sequence[int]) -> Workshop:
        """The same model and stories, with fits of another seed and of these sizes."""
        other = copy.copy(self)
        for name in ("rows", "fishers", "_autoencoders"):
            other.__dict__.pop(name, None)
        other.seed, other.units, other.seconds = seed, units, {}
        return other

    # ---- what edits share

    @cached_property
    def site(self) -> editors.Site:
        """What arrives at the weight, and what draws of the model's own outputs ask of it."""
        uses, _ = self._collected(ed.ModelSample())
        return editors.Site(uses.data[self.weight], uses.asked[self.weight])

    @cached_property
    def _uses(self) -> tuple[positions.Uses, Tensor]:
        """The gradients that directions rebuild, which draw nothing at random."""
        return self._collected(ed.Mean())

    def _collected(self, reference: Any) -> tuple[positions.Uses, Tensor]:
        return positions.collect(
            self.model, self.tokens["train"], divergence=ed.KLDivergence(), reference=reference,
            parameters=[self.weight],
        )  # fmt: skip

    @cached_property
    def rows(self) -> dict[str, dict[int, editors.Rows]]:
        """Dictionaries of changes of rank one, by kind and size."""
        kinds = {"directions": self._directions, "autoencoder": self._folded, "random": self._random}
        found = {}
        for kind, make in kinds.items():
            start = time.process_time()
            found[kind] = {n: make(n) for n in self.units}
            self.seconds[kind] = time.process_time() - start
        return found

    def _directions(self, n: int) -> editors.Rows:
        uses, pool = self._uses
        d = positions.decompose(
            uses.alike(), pool, divergence=ed.KLDivergence(), reference=ed.Mean(), n_directions=n,
            sparsity=ed.BatchTopK(2 / n), steps=self.steps, seed=self.seed,
        )  # fmt: skip
        few = self.tokens["train"][:3]
        reader, writer = (side(d, few, "decoder")[self.weight][:, 0] for side in (readings.readers, readings.writers))
        return editors.Rows(reader, writer)

    def _folded(self, n: int) -> editors.Rows:
        sae, weight = self.autoencoder(n), self.model.get_parameter(self.weight).detach()
        return editors.folded(sae.sae.W_enc.detach().mT, sae.decoder, weight)

    def _random(self, n: int) -> editors.Rows:
        draw = generator(self.seed, "random rows")
        reader, writer = (torch.randn(n, k, generator=draw) for k in self.model.get_parameter(self.weight).shape)
        return editors.Rows(reader, writer)

    def autoencoder(self, n: int) -> autoencoders.Autoencoder:
        """An autoencoder of what arrives at the weight."""
        if n not in self._autoencoders:
            x = self.site.x
            self._autoencoders[n] = autoencoders.train(x, n, 2.0, seed=self.seed, steps=self.sae_steps)
        return self._autoencoders[n]

    @cached_property
    def _autoencoders(self) -> dict[int, autoencoders.Autoencoder]:
        return {}

    @cached_property
    def fishers(self) -> dict[tuple[str, int], Float[Tensor, "v v"]]:
        """The Fisher matrix within every dictionary's span."""
        return {(kind, n): rows.fisher(self.site) for kind, sized in self.rows.items() for n, rows in sized.items()}

    @cached_property
    def shown(self) -> dict[str, Bool[Tensor, " n"]]:
        """The training samples that show each behaviour, as the rule has it."""
        with torch.no_grad():
            parts = [self.tail(x).log_softmax(-1).flatten(0, 1) for x in self.entering["train"].split(128)]
        named = behaviours.SCORED | behaviours.TUNING
        told = [behaviours.behaviours(self.rules, part, named) for part in parts]
        return {name: torch.cat([part[i].on for part in told]) for i, name in enumerate(named)}

    def examples(self, name: str, n: int) -> Examples:
        """n training samples that show a behaviour, each with its window."""
        on = self.shown[name].nonzero()[:, 0]
        draw = generator(self.seed, f"examples {name}")
        index = on[torch.randperm(len(on), generator=draw)[:n]]
        window, position = index // self.length, index % self.length
        members = self.held["validation"].scored[name].members
        samples = torch.arange(len(index)) * self.length + position
        return Examples(self.entering["train"][window], samples, members, self.site.x[index])

    # ---- edits

    def gradient(self, examples: Examples) -> Float[Tensor, "in out"]:
        """The gradient of the examples' mean log mass, at unit norm."""
        return -gradient(self.tail, examples.entering, examples.loss, [self.parameter])[self.parameter]

    def change(
        self, method: str, g: Float[Tensor, "in out"], examples: Examples, n: int, **setting: float
    ) -> Float[Tensor, "in out"]:
        """What a method makes of the gradient and the examples; n is the size of the dictionary of directions."""
        rows, fisher = self.rows["directions"][n], self.fishers["directions", n]
        ways: dict[str, Callable[[], Tensor]] = {
            "several directions": lambda: editors.fitted(g, rows, int(setting["k"])),
            "span of directions": lambda: editors.natural(g, rows, fisher, setting["ridge"]),
            "ROME-like": lambda: editors.rome(g, examples.met.mean(0), self.site, setting["ridge"]),
            "K-FAC step": lambda: editors.whitened(g, self.site, setting["ridge"]),
            "gradient step": lambda: -g,
            "gradient, rank 1": lambda: editors.rank_one(g),
            "LoRA, rank 1": lambda: self.learned(examples, **setting),
            "LoRA, rank 1, Fisher": lambda: self.learned(examples, fisher=self.site.diagonal, **setting),
        }
        return ways[method]()

    def learned(self, examples: Examples, **setting: Any) -> Float[Tensor, "in out"]:
        """LoRA until the examples' mass is halved."""
        with torch.no_grad():
            start = examples.loss(self.tail(examples.entering).flatten(0, 1)).item()
        tuned = editors.learned(
            Target(self.tail, [self.parameter]), examples.entering, examples.loss, until=start + math.log(0.5),
            steps=40, seed=self.seed, **setting,
        )  # fmt: skip
        return tuned.change[self.parameter]

    def move(self, change: Float[Tensor, "in out"]) -> Move:
        """The change at unit norm, as a move of the model's tail."""
        return displaced(self.tail, {self.parameter: change / change.norm()})

    def score(self, move: Move, name: str, split: str, **search: float) -> Score | None:
        """What the move does on held-out stories once the behaviour's mass is halved there."""
        held = self.held[split]
        return held.bench.score(move, held.scored[name], **search)

    def unit(self, kind: str, n: int, g: Float[Tensor, "in out"], name: str) -> Move | None:
        """Of a dictionary's most promising rows, the one that costs least on validation stories."""
        rows = self.rows[kind][n]
        numbers = editors.candidates(g, rows, self.fishers[kind, n], CHOICES).tolist()
        return self.best([self.move(editors.along_row(g, rows, number)) for number in numbers], name)

    def hooked(self, n: int, examples: Examples, name: str) -> Move | None:
        """Of the autoencoder's units that the examples use most beyond others, the best to scale, by a hook."""
        sae = self.autoencoder(n)
        beyond = sae.encode(examples.met).mean(0) - sae.encode(self.site.x).mean(0)
        moves = [self._scaled(sae, unit) for unit in beyond.topk(CHOICES).indices.tolist()]
        return self.best(moves, name, largest=20.0)

    def _scaled(self, sae: autoencoders.Autoencoder, unit: int) -> Move:
        return lambda delta: sae.steered(self.tail, f"inner.{self.site_name}", {unit: -delta}, how="scale")

    def best(self, moves: Sequence[Move], name: str, **search: float) -> Move | None:
        """The move with the least damage on validation stories; None where none reaches the level."""
        scores = [(self.score(move, name, "validation", **search), move) for move in moves]
        reached = [(score.damage, i) for i, (score, _) in enumerate(scores) if score is not None]
        return moves[min(reached)[1]] if reached else None


# ---- the comparison


@dataclass
class Choice:
    """What was chosen on the tuning behaviours: the size of each dictionary, the setting of each method."""

    sizes: dict[str, int]
    settings: dict[str, dict[str, float]]
    tried: list[dict[str, Any]]


def mean_log(values: Sequence[float]) -> float:
    """The logarithm of the geometric mean; infinite where an edit did not reach its level (None is not given)."""
    return sum(math.log(value) for value in values) / len(values)


def tuned(shop: Workshop, n: int, tuning: Sequence[str] = tuple(behaviours.TUNING)) -> Choice:
    """Sizes and settings with the least geometric mean damage on validation stories, over the tuning behaviours."""
    given = {name: shop.examples(name, n) for name in tuning}
    gradients = {name: shop.gradient(given[name]) for name in tuning}
    tried: list[dict[str, Any]] = []

    def cost(method: str, setting: dict[str, Any], moves: Mapping[str, Move | None], **search: float) -> float:
        scores = [move and shop.score(move, name, "validation", **search) for name, move in moves.items()]
        found = [score.damage for score in scores if score is not None]
        value = mean_log(found) if len(found) == len(tuning) else math.inf
        tried.append({"method": method, **setting, "damage": math.exp(value) if found else None})
        return value

    sizes: dict[str, int] = {}
    for kind, method in DICTIONARIES.items():
        costs = {
            u: cost(method, {"units": u}, {name: shop.unit(kind, u, gradients[name], name) for name in tuning})
            for u in shop.units
        }
        sizes[kind] = min(costs, key=lambda u: costs[u])
    settings: dict[str, dict[str, float]] = {}
    for method, grid in GRID.items():
        costs = []
        for setting in grid:
            made = {
                name: shop.move(shop.change(method, gradients[name], given[name], sizes["directions"], **setting))
                for name in tuning
            }
            costs.append(cost(method, setting, made) if len(grid) > 1 else 0.0)
        settings[method] = grid[costs.index(min(costs))]
    return Choice(sizes, settings, tried)


def made(shop: Workshop, choice: Choice, name: str, n: int) -> Iterator[tuple[str, Move | None, float, int]]:
    """(method, move, seconds to make it beyond what edits share, numbers to write it down), for every method."""
    width = sum(shop.model.get_parameter(shop.weight).shape)
    full = shop.model.get_parameter(shop.weight).numel()
    start = time.process_time()
    examples = shop.examples(name, n)
    g = shop.gradient(examples)
    shared = time.process_time() - start
    for kind, method in DICTIONARIES.items():
        start = time.process_time()
        yield method, shop.unit(kind, choice.sizes[kind], g, name), shared + time.process_time() - start, width
    start = time.process_time()
    move = shop.hooked(choice.sizes["autoencoder"], examples, name)
    yield "SAE unit, hook", move, time.process_time() - start, 2 * shop.site.x.shape[1] + 2
    for method, setting in choice.settings.items():
        start = time.process_time()
        change = shop.change(method, g, examples, choice.sizes["directions"], **setting)
        rank = int(setting["k"]) if "k" in setting else 1
        dense = method in ("span of directions", "K-FAC step", "gradient step")
        yield method, shop.move(change), shared + time.process_time() - start, full if dense else rank * width


def compare(shop: Workshop, choice: Choice, names: Sequence[str], n: int) -> list[dict[str, Any]]:
    """One row a behaviour and method: what the edit does on test stories. Scores are None where none reaches it."""
    rows = []
    for name in names:
        for method, move, seconds, numbers in made(shop, choice, name, n):
            search = {"largest": 20.0} if method == "SAE unit, hook" else {}
            score = move and shop.score(move, name, "test", **search)
            row: dict[str, Any] = {"behaviour": name, "method": method, "examples": n, "layer": shop.layer}
            row |= {"seed": shop.seed, "seconds": seconds, "bytes": 4 * numbers}
            row.update(dict.fromkeys(SCORES) if score is None else asdict(score))
            rows.append(row)
    return rows
