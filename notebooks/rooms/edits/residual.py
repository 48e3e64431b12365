"""One feature of a residual network, whose computation is known, edited away in many ways at equal success.

An edit is to leave a set share of the squared size of what the layers add to the feature's own output. Methods give
candidates: weight changes or hooks, in all layers or at one site. The best candidate is chosen on validation samples,
the step is such that success is equal, and the rest of the network is looked at on test samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.decomposition import Decomposition
from eigendecomp.study import autoencoders, moves
from eigendecomp.study.moves import Move, displaced
from eigendecomp.target import Target
from eigendecomp.targets.toys import resid_mlp
from rooms import fitting, switches
from rooms.edits import editors

Change = dict[str, Tensor]
CHOICES = 2  # units or rows of a kind that are tried on validation samples
PER_FEATURE = 1.5  # directions, and units of an autoencoder
GRID: dict[str, list[dict[str, float]]] = {
    "ROME-like, one layer": [{"ridge": ridge} for ridge in (0.01, 0.1, 1.0, 10.0)],
    "ROME-like, every layer": [{"ridge": ridge} for ridge in (0.01, 0.1, 1.0, 10.0)],
    "SAE unit, one layer": [{"kept": kept} for kept in (1.0, 2.0, 4.0)],
    "LoRA, one layer": [{"held": held, "learning_rate": 0.01} for held in (0.0, 1.0, 10.0)],
    "LoRA, every layer": [{"held": held, "learning_rate": 0.01} for held in (0.0, 1.0, 10.0)],
}


@dataclass
class Network:
    """A trained network and what its edits share; fits depend on the seed."""

    layers: int
    seed: int
    kept: float = 2.0  # of an autoencoder's units on a sample
    steps: int | None = None  # of a fit; None for as many as the depth takes
    training_steps: int = fitting.TRAINING_STEPS["identity"]
    steps_of_one: int = 700  # of a fit to one layer alone
    sae_steps: int = 400

    @cached_property
    def model(self) -> resid_mlp.ResidMLP:
        """The network, with the identity as embedding."""
        size = fitting.SIZES[self.layers]
        return resid_mlp.train(
            self.layers, "identity", seed=self.seed, steps=self.training_steps, batch_size=256, **size
        )[0]

    @property
    def features(self) -> int:
        return len(self.model.W_E)

    def fit(self, only: int = -1) -> Decomposition:
        """Directions of all layers, or of one."""
        n = round(PER_FEATURE * self.features)
        return fitting.fit(
            self.model, n, seed=self.seed, steps=self.steps if only < 0 else self.steps_of_one, only=only,
            single=True,
        )  # fmt: skip

    @cached_property
    def fits(self) -> dict[int, Decomposition]:
        """By the layer that they are of; −1 for all."""
        return {only: self.fit(only) for only in range(-1, self.layers)}

    @cached_property
    def cost(self) -> dict[int, Float[Tensor, " v"]]:
        """uᵀHu of every direction, a mean over unlabelled samples."""
        return {only: d.activation(self.data[:300]).square().mean(0) for only, d in self.fits.items()}

    @cached_property
    def data(self) -> Float[Tensor, "n features"]:
        """Unlabelled samples."""
        return resid_mlp.data(5000, self.features, torch.Generator().manual_seed(3000 + self.seed))

    @cached_property
    def met(self) -> dict[str, Float[Tensor, "n in"]]:
        """What arrives at every weight on the unlabelled samples."""
        return inputs_of(self.model, self.data)

    @cached_property
    def saes(self) -> list[autoencoders.Autoencoder]:
        """An autoencoder of every layer's neurons."""
        units = round(PER_FEATURE * self.features)
        return [
            autoencoders.train(
                self.met[f"layers.{layer}.W_out.weight"], units, self.kept, seed=self.seed, steps=self.sae_steps,
                batch_size=512,
            )
            for layer in range(self.layers)
        ]  # fmt: skip

    def names(self, layer: int) -> list[str]:
        """A layer's weights."""
        return [f"layers.{layer}.{key}.weight" for key in ("W_in", "W_out")]


@torch.no_grad()
def inputs_of(model: resid_mlp.ResidMLP, x: Float[Tensor, "n features"]) -> dict[str, Float[Tensor, "n in"]]:
    """What arrives at every weight."""
    caught: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, given, _o, name=name: caught.update({f"{name}.weight": given[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return caught


def on_samples(features: int, feature: int, n: int, seed: int) -> Float[Tensor, "n features"]:
    """Samples with one feature on, positive, and others by chance."""
    draw = torch.Generator().manual_seed(seed)
    x = resid_mlp.data(n, features, draw, none_empty=False)
    x[:, feature] = torch.rand(n, generator=draw)
    return x


@dataclass(frozen=True)
class Score:
    """What an edit did once no more than the level is left; squared sizes."""

    step: float
    left: float
    damage: float  # squared change of what is computed where the feature is not on, as a share of its squared size
    worst: float  # the same for the single feature, on alone, that suffers most, in units of the mean feature's
    beside: float  # squared change of other outputs where the feature is on, in units of its own


@dataclass
class Task:
    """A feature to be edited away from n labelled examples."""

    network: Network
    feature: int
    n: int
    level: float

    @cached_property
    def examples(self) -> Float[Tensor, "m features"]:
        """The labelled examples, and the same with the feature put to zero."""
        x = on_samples(self.network.features, self.feature, self.n, 10_000 + 100 * self.network.seed + self.feature)
        return torch.cat([x, without(x, self.feature)])

    def loss(self, f: Float[Tensor, "m k"]) -> Tensor:
        """Mean squared gain of the feature's output by its input, beyond what the stream carries."""
        carried = (self.examples[: self.n] - self.examples[self.n :])[:, self.feature]
        return (f[: self.n, self.feature] - f[self.n : 2 * self.n, self.feature] - carried).square().mean()

    @cached_property
    def gradient(self) -> Change:
        """The unit change of all weights that lowers the loss fastest."""
        return moves.gradient(self.network.model, self.examples, self.loss)

    @cached_property
    def switch(self) -> dict[str, switches.Switch]:
        """What is held out, by split."""
        network, made = self.network, {}
        for number, split in enumerate(("validation", "test")):
            seed = 20_000 + 10_000 * number + 100 * network.seed
            x = on_samples(network.features, self.feature, 60, seed + self.feature)
            rest = resid_mlp.data(600, network.features, torch.Generator().manual_seed(seed))
            made[split] = switches.Switch(network.model, lambda m, x: m.computed(x), x, rest, self.feature)
        return made

    def score(self, split: str, move: Move, largest: float) -> Score | None:
        """At the first step found that leaves the level; None where none does."""
        switch = self.switch[split]
        reached = moves.matched(
            lambda step: torch.tensor(switch.effect(move, step).left), lambda left: 1 - left, 1 - self.level,
            first=largest / 50, tolerance=0.01, largest=largest, tries=25,
        )  # fmt: skip
        if reached is None:
            return None
        effect = switch.effect(move, reached[0])
        return Score(effect.step, effect.left, effect.elsewhere, self.worst(move, reached[0]), effect.beside)

    @torch.no_grad()
    def worst(self, move: Move, step: float) -> float:
        """The other feature whose computation, on alone, changes most."""
        model, alone = self.network.model, torch.eye(self.network.features)
        base = model.computed(alone)
        with move(step) as moved:
            change = (moved.computed(alone) - base).square().sum(1)  # type: ignore[operator]
        change[self.feature] = 0
        return (change.max() / base.square().sum(1).mean()).item()


def without(x: Tensor, feature: int) -> Tensor:
    """The samples with a feature off."""
    x = x.clone()
    x[:, feature] = 0
    return x


# ---- methods: each gives candidates, a move and its largest step, and the numbers that one takes to write down

Candidates = Sequence[tuple[Move, float]]
WEIGHT, HOOK = 30.0, 20.0  # the largest steps: norm of a change of the weights, multiples of a unit


def changed(task: Task, changes: Sequence[Mapping[str, Tensor]]) -> Candidates:
    """Changes of the weights, at unit norm."""
    candidates = []
    for change in changes:
        norm = torch.stack([block.square().sum() for block in change.values()]).sum().sqrt()
        if norm > 0:
            unit = {name: block / norm for name, block in change.items()}
            candidates.append((displaced(task.network.model, unit), WEIGHT))
    return candidates


def rows_of(task: Task, only: int) -> list[Change]:
    """The directions that lower the loss most for what they change, in the sense that lowers it."""
    d = task.network.fits[only]
    rows = d.directions()
    inner = sum((rows[name] * task.gradient[name]).flatten(1).sum(1) for name in rows)
    assert isinstance(inner, Tensor)
    cost = task.network.cost[only]
    best = (inner.square() / cost.clamp_min(1e-6 * cost.max())).topk(CHOICES).indices.tolist()
    return [{name: inner[v].sign() * row[v] for name, row in rows.items()} for v in best]


def parts(task: Task) -> list[Change]:
    """The same directions' parts in one layer."""
    return [
        {name: row[name] for name in task.network.names(layer)}
        for row in rows_of(task, -1)
        for layer in range(task.network.layers)
    ]


def neurons(task: Task) -> Candidates:
    """The neurons that do most for the feature in the examples, by what they add to its output."""
    candidates = []
    for layer in range(task.network.layers):
        name = f"layers.{layer}.W_out.weight"
        h = inputs_of(task.network.model, task.examples)[name]
        adds = (h[: task.n] - h[task.n :]).mean(0) * task.network.model.get_parameter(name).detach()[task.feature]
        candidates += [
            (switches.without(task.network.model, name, j), HOOK) for j in adds.abs().topk(3).indices.tolist()
        ]
    return candidates


def strongest(task: Task, layer: int) -> list[int]:
    """The units of a layer's autoencoder that are on more with the feature than without."""
    h = inputs_of(task.network.model, task.examples)[f"layers.{layer}.W_out.weight"]
    z = task.network.saes[layer].encode(h)
    gain = (z[: task.n] - z[task.n :]).mean(0)
    return [unit for unit in gain.topk(CHOICES).indices.tolist() if gain[unit] > 0]


def hooked(task: Task) -> Candidates:
    """Autoencoders' units made smaller, by a hook, at one layer."""
    network = task.network
    return [
        (switches.scaled_unit(network.saes[layer], network.model, f"layers.{layer}.relu", unit), HOOK)
        for layer in range(network.layers)
        for unit in strongest(task, layer)
    ]


def hooked_everywhere(task: Task) -> Candidates:
    """The strongest unit of every layer, all made smaller by the same step."""
    network = task.network
    units = {layer: strong[0] for layer in range(network.layers) if (strong := strongest(task, layer))}

    @contextmanager
    def move(delta: float) -> Iterator[nn.Module]:
        with ExitStack() as stack:
            for layer, unit in units.items():
                stack.enter_context(
                    network.saes[layer].steered(network.model, f"layers.{layer}.relu", {unit: -delta}, how="scale")
                )
            yield network.model

    return [(move, HOOK)] if units else []


def folded(task: Task) -> list[Change]:
    """Autoencoders' units as changes of the weight after them: W_out d ⊗ e, in the sense that lowers the loss."""
    candidates = []
    for layer in range(task.network.layers):
        name, sae = f"layers.{layer}.W_out.weight", task.network.saes[layer]
        weight, encoder = task.network.model.get_parameter(name).detach(), sae.sae.W_enc.detach().mT
        for unit in strongest(task, layer):
            change = torch.outer(weight @ sae.decoder[unit], encoder[unit])
            candidates.append({name: change * (change * task.gradient[name]).sum().sign()})
    return candidates


def rome(task: Task, ridge: float) -> Change:
    """For every weight −C⁻¹k ⊗ Gᵀk, k the mean of what the feature adds to what arrives there in the examples."""
    met, change = inputs_of(task.network.model, task.examples), {}
    for name, arrived in task.network.met.items():
        key = (met[name][: task.n] - met[name][task.n :]).mean(0)
        site = editors.Site(arrived, arrived)  # what is asked has no say here
        change[name] = editors.rome(-task.gradient[name].mT, key, site, ridge).mT
    return change


def adapted(task: Task, patterns: Sequence[str], held: float, learning_rate: float) -> Change:
    """LoRA of rank one on the examples until the level; ``held`` weighs the squared change on unlabelled samples."""
    model, others, size = task.network.model, task.network.data[:200], 2 * task.n
    others = others[others[:, task.feature] <= 0]
    with torch.no_grad():
        base, start = model(others), task.loss(model(task.examples)).item()
        unit = model.computed(others).square().mean()

    def loss(f: Float[Tensor, "n k"]) -> Tensor:
        return task.loss(f) / start + held * (f[size:] - base).square().mean() / unit

    return editors.learned(
        Target(model, patterns), torch.cat([task.examples, others]), loss, until=task.level, steps=150,
        learning_rate=learning_rate, seed=task.network.seed,
    ).change  # fmt: skip


def one_layer(task: Task, change: Mapping[str, Tensor]) -> list[Change]:
    """A change's parts in single layers."""
    return [{name: change[name] for name in task.network.names(layer)} for layer in range(task.network.layers)]


def one_weight(change: Mapping[str, Tensor]) -> list[Change]:
    """A change's parts in single weights."""
    return [{name: block} for name, block in change.items()]


def by_layer(task: Task, **setting: float) -> list[Change]:
    """An adapter for every layer alone."""
    return [adapted(task, task.network.names(layer), **setting) for layer in range(task.network.layers)]


METHODS: dict[str, Callable[..., Candidates]] = {
    "one direction": lambda t: changed(t, rows_of(t, -1)),
    "gradient step, every layer": lambda t: changed(t, [t.gradient]),
    "LoRA, every layer": lambda t, **s: changed(t, [adapted(t, ["*"], **s)]),
    "ROME-like, every layer": lambda t, ridge: changed(t, [rome(t, ridge)]),
    "SAE unit, every layer": lambda t: hooked_everywhere(t),
    "direction's part, one layer": lambda t: changed(t, parts(t)),
    "direction fitted to one layer": lambda t: changed(t, [r for k in range(t.network.layers) for r in rows_of(t, k)]),
    "gradient step, one layer": lambda t: changed(t, one_layer(t, t.gradient)),
    "LoRA, one layer": lambda t, **s: changed(t, by_layer(t, **s)),
    "ROME-like, one layer": lambda t, ridge: changed(t, one_weight(rome(t, ridge))),
    "SAE unit, one layer": lambda t: hooked(t),
    "SAE unit folded, one layer": lambda t: changed(t, folded(t)),
    "one neuron": lambda t: neurons(t),
}


def numbers(network: Network, method: str) -> int:
    """How many numbers an edit takes to write down."""
    sizes = {name: tuple(p.shape) for name, p in network.model.named_parameters()}
    layers, (out, inside) = network.layers, sizes["layers.0.W_out.weight"]
    rank_one = 2 * (out + inside)  # of a layer's two weights
    return {
        "one direction": layers * rank_one, "LoRA, every layer": layers * rank_one,
        "ROME-like, every layer": layers * rank_one, "gradient step, every layer": layers * 2 * out * inside,
        "gradient step, one layer": 2 * out * inside, "SAE unit, every layer": layers * (2 * inside + 2),
        "SAE unit, one layer": 2 * inside + 2, "one neuron": 2, "SAE unit folded, one layer": out + inside,
        "ROME-like, one layer": out + inside,
    }.get(method, rank_one)  # fmt: skip


def chosen(task: Task, candidates: Candidates) -> tuple[Move, float] | None:
    """The candidate that changes least elsewhere on validation samples; None where none reaches the level."""
    scores = [task.score("validation", *candidate) for candidate in candidates]
    reached = [(score.damage, i) for i, score in enumerate(scores) if score is not None]
    return candidates[min(reached)[1]] if reached else None


def tuned(
    network: Network, features: Sequence[int] = (2, 50), n: int = 10, level: float = 0.25
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Settings with the least geometric mean damage on validation samples of a network, and all that was tried."""
    settings: dict[str, dict[str, float]] = {}
    tried: list[dict[str, Any]] = []
    for method, grid in GRID.items():
        costs = []
        for setting in grid:
            if "kept" in setting:
                network.kept = setting["kept"]
                network.__dict__.pop("saes", None)
            given = {} if "kept" in setting else setting
            damages = []
            for feature in features:
                task = Task(network, feature, n, level)
                candidates = METHODS[method](task, **given)
                best = chosen(task, candidates)
                score = best and task.score("validation", *best)
                damages.append(None if score is None else score.damage)
            reached = all(value is not None for value in damages)
            costs.append(torch.tensor(damages).log().mean().exp().item() if reached else float("inf"))
            tried.append({"method": method, **setting, "damage": costs[-1] if reached else None})
        settings[method] = grid[costs.index(min(costs))]
    return settings, tried


def compare(task: Task, settings: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One row a method: what its edit does on test samples. Scores are None where none reaches the level."""
    rows = []
    for method, make in METHODS.items():
        setting = settings.get(method, {}) if not method.startswith("SAE") else {}
        start = time.process_time()
        best = chosen(task, make(task, **setting))
        seconds, score = time.process_time() - start, best and task.score("test", *best)
        row: dict[str, Any] = {"layers": task.network.layers, "seed": task.network.seed, "behaviour": task.feature}
        row |= {"method": method, "examples": task.n, "level": task.level, "seconds": seconds}
        row |= {"bytes": 4 * numbers(task.network, method)}
        row |= dict.fromkeys(("step", "left", "damage", "worst", "beside")) if score is None else vars(score)
        rows.append(row)
    return rows
