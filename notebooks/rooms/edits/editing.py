"""The benchmark of edits on the story model: one MLP weight of a block, edited in many ways to lose behaviours.

All edits are of the same weight, ``blocks.L.mlp.W_in`` of the model written with standard inputs, and are made from the
same labelled examples: training samples that show the behaviour. What methods differ in is the change. Units are chosen
on validation stories and settings on two behaviours that are not scored; scores are of test stories.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.study import autoencoders
from eigendecomp.study.moves import Move, displaced, gradient
from eigendecomp.target import Target
from rooms.edits import behaviours, editors
from rooms.edits.edits import Score
from rooms.edits.workshop import Examples, Others, Workshop

SCORES = ("step", "left", "damage", "worst", "same_words")
CHOICES = 3  # rows of a dictionary that are tried on validation stories
DICTIONARIES = {"directions": "one direction", "autoencoder": "SAE unit, folded", "random": "one random row"}
# What is tried for each method on the tuning behaviours.
GRID: dict[str, list[dict[str, float]]] = {
    "several directions": [{"k": k} for k in (3, 10, 30, 100)],
    "span of directions": [{"ridge": ridge} for ridge in (1e-2, 1e-1, 1.0, 10.0, 100.0)],
    "ROME-like": [{"ridge": ridge} for ridge in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)],
    "K-FAC step": [{"ridge": ridge} for ridge in (1e-2, 1e-1, 1.0, 10.0, 100.0)],
    "gradient step": [{}],
    "gradient, rank 1": [{}],
    "LoRA, rank 1": [
        *({"learning_rate": rate} for rate in (1e-2, 3e-2, 1e-1)),
        *({"learning_rate": rate, "aligned": 1.0} for rate in (1e-2, 3e-2, 1e-1)),
    ],
    "LoRA, rank 1, Fisher": [
        *({"learning_rate": 3e-2, "penalty": penalty} for penalty in (0.1, 1.0, 10.0)),
        *({"learning_rate": 3e-2, "penalty": penalty, "aligned": 1.0} for penalty in (0.01, 0.1, 1.0)),
    ],
    "LoRA, rank 1, KL": [
        *({"learning_rate": 3e-2, "held": held} for held in (10.0, 100.0)),
        *({"learning_rate": 3e-2, "held": held, "aligned": 1.0} for held in (10.0, 100.0)),
    ],
}
RIDGES = (1e-2, 1e-1, 1.0, 10.0)  # of the readers of these rows, which are made of others
MADE_OF = {"one direction, whitened": "directions", "SAE unit, regressed": "autoencoder"}
METHODS = (*DICTIONARIES.values(), "SAE unit, hook", *MADE_OF, *GRID)


# ---- edits


def gradient_of(shop: Workshop, examples: Examples) -> Float[Tensor, "in out"]:
    """The gradient of the examples' mean log mass, at unit norm."""
    return -gradient(shop.tail, examples.entering, examples.loss, [shop.parameter])[shop.parameter]


def changed(
    shop: Workshop, method: str, g: Float[Tensor, "in out"], examples: Examples, n: int, **setting: float
) -> Float[Tensor, "in out"]:
    """What a method makes of the gradient and the examples; n is the size of the dictionary of directions."""
    ways: dict[str, Callable[[], Tensor]] = {
        "several directions": lambda: editors.fitted(g, shop.rows["directions"][n], int(setting["k"])),
        "span of directions": lambda: editors.natural(
            g, shop.rows["directions"][n], shop.fishers["directions", n], setting["ridge"]
        ),
        "ROME-like": lambda: editors.rome(g, examples.met.mean(0), shop.site, setting["ridge"]),
        "K-FAC step": lambda: editors.whitened(g, shop.site, setting["ridge"]),
        "gradient step": lambda: -g,
        "gradient, rank 1": lambda: editors.rank_one(g),
        "LoRA, rank 1": lambda: learned(shop, g, examples, **setting),
        "LoRA, rank 1, Fisher": lambda: learned(shop, g, examples, fisher=shop.site.diagonal, **setting),
        "LoRA, rank 1, KL": lambda: learned(shop, g, examples, **setting),
    }
    return ways[method]()


def learned(
    shop: Workshop, g: Float[Tensor, "in out"], examples: Examples, *, aligned: float = 0.0, held: float = 0.0,
    **setting: Any,
) -> Float[Tensor, "in out"]:  # fmt: skip
    """LoRA until the examples' mass is halved; ``aligned`` starts it with the gradient's own writer (LoRA-GA).

    ``held`` weighs the divergence from the model on unlabelled samples that do not show the behaviour.
    """
    others, size = Others.of(shop, examples.name) if held else None, len(examples.entering) * shop.length

    def loss(f: Float[Tensor, "n k"]) -> Tensor:
        return examples.loss(f) + (held * others.divergence(f[size:]) if others else 0.0)

    inputs = torch.cat([examples.entering, others.entering]) if others else examples.entering
    with torch.no_grad():
        start = examples.loss(shop.tail(examples.entering).flatten(0, 1)).item()
    tuned = editors.learned(
        Target(shop.tail, [shop.parameter]), inputs, loss, until=start + math.log(0.5),
        steps=40, seed=shop.seed, writer=torch.linalg.svd(g).Vh[0] if aligned else None, **setting,
    )  # fmt: skip
    return tuned.change[shop.parameter]


def move_of(shop: Workshop, change: Float[Tensor, "in out"]) -> Move:
    """The change at unit norm, as a move of the model's tail."""
    return displaced(shop.tail, {shop.parameter: change / change.norm()})


def scored(shop: Workshop, move: Move, name: str, split: str, **search: float) -> Score | None:
    """What the move does on held-out stories once the behaviour's mass is halved there."""
    held = shop.held[split]
    return held.bench.score(move, held.scored[name], **search)


def unit(shop: Workshop, kind: str, n: int, g: Float[Tensor, "in out"], name: str) -> Move | None:
    """Of a dictionary's most promising rows, the one that costs least on validation stories."""
    return unit_of(shop, shop.rows[kind][n], shop.fishers[kind, n], g, name)


def unit_of(
    shop: Workshop, rows: editors.Rows, fisher: Float[Tensor, "v v"], g: Float[Tensor, "in out"], name: str
) -> Move | None:
    """The same of any rows."""
    numbers = editors.candidates(g, rows, fisher, CHOICES).tolist()
    return best(shop, [move_of(shop, editors.along_row(g, rows, number)) for number in numbers], name)


def made_of(shop: Workshop, method: str, n: int, ridge: float) -> tuple[editors.Rows, Float[Tensor, "v v"]]:
    """Rows that are made of a dictionary's with what arrives at the weight, and their Fisher matrix."""
    if (method, n, ridge) not in shop.remade:
        if method == "SAE unit, regressed":
            sae, weight = shop.autoencoder(n), shop.model.get_parameter(shop.weight).detach()
            rows = editors.regressed(sae.encode(shop.site.x), sae.decoder, weight, shop.site, ridge)
        else:
            rows = editors.whitened_readers(shop.rows[MADE_OF[method]][n], shop.site, ridge)
        shop.remade[method, n, ridge] = rows, rows.fisher(shop.site)
    return shop.remade[method, n, ridge]


def hooked(shop: Workshop, n: int, examples: Examples, name: str) -> Move | None:
    """Of the autoencoder's units that the examples use most beyond others, the best to scale, by a hook."""
    sae = shop.autoencoder(n)
    beyond = sae.encode(examples.met).mean(0) - sae.encode(shop.site.x).mean(0)
    moves = [scaled(shop, sae, unit) for unit in beyond.topk(CHOICES).indices.tolist()]
    return best(shop, moves, name, largest=20.0)


def scaled(shop: Workshop, sae: autoencoders.Autoencoder, unit: int) -> Move:
    """δ ↦ the model with what the unit adds made smaller by δ times itself, by a hook; 1 is its ablation."""
    return lambda delta: sae.steered(shop.tail, f"inner.{shop.site_name}", {unit: -delta}, how="scale")


def best(shop: Workshop, moves: Sequence[Move], name: str, **search: float) -> Move | None:
    """The move with the least damage on validation stories; None where none reaches the level."""
    scores = [(scored(shop, move, name, "validation", **search), move) for move in moves]
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


Make = Callable[[str, dict[str, Any]], Move | None]


def weighed(shop: Workshop, method: str, setting: dict[str, Any], make: Make, tuning: Sequence[str]) -> dict[str, Any]:
    """A setting with its geometric mean damage on validation stories; None where it fails on a tuning behaviour."""
    moves = {name: make(name, setting) for name in tuning}
    scores = [move and scored(shop, move, name, "validation") for name, move in moves.items()]
    damages = [score.damage for score in scores if score is not None]
    damage = math.exp(mean_log(damages)) if len(damages) == len(tuning) else None
    return {"method": method, **setting, "damage": damage}


def tuned(
    shop: Workshop, n: int, before: Choice | None = None, methods: Sequence[str] | None = None,
    tuning: Sequence[str] = tuple(behaviours.TUNING),
) -> Choice:  # fmt: skip
    """Sizes and settings with the least geometric mean damage on validation stories, over the tuning behaviours.

    What was chosen ``before`` stays as it is; of the rest ``methods`` alone are tuned, all if there are none.
    """
    sizes, settings = (before.sizes, before.settings) if before else ({}, {})
    given = {name: shop.examples(name, n) for name in tuning}
    gradients = {name: gradient_of(shop, given[name]) for name in tuning}
    tried: list[dict[str, Any]] = list(before.tried) if before else []

    def choose(method: str, grid: Sequence[dict[str, Any]], make: Make) -> dict[str, Any]:
        rows = [weighed(shop, method, setting, make, tuning) for setting in grid]
        tried.extend(rows)
        return min(zip(rows, grid, strict=True), key=lambda pair: pair[0]["damage"] or math.inf)[1]

    for kind, method in DICTIONARIES.items():
        if kind not in sizes:
            sizes[kind] = choose(
                method, [{"units": units} for units in shop.sizes[kind]],
                lambda name, s, kind=kind: unit(shop, kind, s["units"], gradients[name], name),
            )["units"]  # fmt: skip
    wanted = METHODS if methods is None else methods
    for method, kind in MADE_OF.items():
        if method in wanted and method not in settings:
            settings[method] = choose(
                method, [{"ridge": ridge} for ridge in RIDGES], lambda name, s, method=method, kind=kind: unit_of(
                    shop, *made_of(shop, method, sizes[kind], s["ridge"]), gradients[name], name
                ),
            )  # fmt: skip
    for method, grid in GRID.items():
        if method in wanted and method not in settings:
            settings[method] = grid[0] if len(grid) == 1 else choose(
                method, grid, lambda name, s, method=method: move_of(
                    shop, changed(shop, method, gradients[name], given[name], sizes["directions"], **s)
                ),
            )  # fmt: skip
    return Choice(sizes, settings, tried)


def made(
    shop: Workshop, choice: Choice, name: str, n: int, methods: Sequence[str]
) -> Iterator[tuple[str, Move | None, float, int]]:
    """(method, move, seconds to make it beyond what edits share, numbers to write it down), for these methods."""
    width = sum(shop.model.get_parameter(shop.weight).shape)
    full = shop.model.get_parameter(shop.weight).numel()
    start = time.process_time()
    examples = shop.examples(name, n)
    g = gradient_of(shop, examples)
    shared = time.process_time() - start
    ways: dict[str, tuple[Callable[[], Move | None], int]] = {
        method: (lambda kind=kind: unit(shop, kind, choice.sizes[kind], g, name), width)
        for kind, method in DICTIONARIES.items()
    }
    ways["SAE unit, hook"] = (
        lambda: hooked(shop, choice.sizes["autoencoder"], examples, name), 2 * shop.site.x.shape[1] + 2
    )  # fmt: skip
    for method, kind in MADE_OF.items():
        ridge = choice.settings.get(method, {}).get("ridge", 1.0)
        ways[method] = (
            lambda method=method, kind=kind, ridge=ridge: unit_of(
                shop, *made_of(shop, method, choice.sizes[kind], ridge), g, name
            ), width,
        )  # fmt: skip
    for method in GRID:
        setting, dense = (
            choice.settings.get(method, {}),
            method in ("span of directions", "K-FAC step", "gradient step"),
        )
        ways[method] = (
            lambda method=method, setting=setting: move_of(
                shop, changed(shop, method, g, examples, choice.sizes["directions"], **setting)
            ), full if dense else int(setting.get("k", 1)) * width,
        )  # fmt: skip
    for method in methods:
        make, numbers = ways[method]
        start = time.process_time()
        move = make()
        yield method, move, shared + time.process_time() - start, numbers


def compare(
    shop: Workshop, choice: Choice, names: Sequence[str], n: int, methods: Sequence[str] = METHODS
) -> list[dict[str, Any]]:
    """One row a behaviour and method: what the edit does on test stories. Scores are None where none reaches it."""
    rows = []
    for name in names:
        for method, move, seconds, numbers in made(shop, choice, name, n, methods):
            search = {"largest": 20.0} if method == "SAE unit, hook" else {}
            score = move and scored(shop, move, name, "test", **search)
            row: dict[str, Any] = {"behaviour": name, "method": method, "examples": n, "layer": shop.layer}
            row |= {"seed": shop.seed, "seconds": seconds, "bytes": 4 * numbers}
            row.update(dict.fromkeys(SCORES) if score is None else asdict(score))
            rows.append(row)
    return rows
