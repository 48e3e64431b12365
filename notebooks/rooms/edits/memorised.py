"""Memorised text: a copy of the story model overtrained on a few stories, edited until it no longer knows them.

The copy sees the same few windows at every step, beside ordinary ones, until it says them by heart. Edits are changes
of one MLP weight and are made from the labelled half of these windows. Success is that their loss is back at the level
of the model before; the cost is what happens to other stories. The other half, which no edit has seen, tells whether an
edit takes what was memorised or the text that it was shown.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

import eigendecomp as ed
from eigendecomp.study import autoencoders, moves, readings
from eigendecomp.study.moves import Move, displaced
from eigendecomp.target import Target
from eigendecomp.targets.stories import model as stories
from rooms.edits import editors
from rooms.edits.edits import divergence, log_probabilities
from rooms.edits.workshop import Tail, TailProbe
from rooms.stories import concepts
from rooms.stories.standardised import standardised

Matrix = Float[Tensor, "in out"]
LAYER = 5  # the block whose MLP weight W_in is edited
PROMPT = 16  # the tokens of a window that are taken as given
GRID: dict[str, list[dict[str, float]]] = {
    "gradient step": [{}],
    "K-FAC step": [{"ridge": ridge} for ridge in (0.1, 1.0, 10.0)],
    "gradient, small curvature": [{"share": share} for share in (0.5, 0.7, 0.9)],
    "weight, small curvature": [{"share": share} for share in (0.5, 0.7, 0.9)],
    "ROME-like": [{"ridge": ridge} for ridge in (0.01, 0.1, 1.0)],
    "LoRA, rank 1, Fisher": [{"penalty": penalty} for penalty in (0.01, 0.1)],
    "LoRA, rank 1, KL": [{"held": held} for held in (0.3, 1.0, 3.0)],
    "one random row": [{}],
    "SAE unit, folded": [{"units": 100}],
    "one direction of the memorised": [{"units": 30}],
    "span of the memorised": [{"units": 30, "ridge": ridge} for ridge in (0.1, 1.0, 10.0)],
    "one direction": [{"units": 100}],
    "span of directions": [{"units": 100, "ridge": ridge} for ridge in (1.0, 10.0, 100.0)],
}
UNLABELLED = ("weight, small curvature",)  # made without the labelled windows, which only set the step


@dataclass
class Overtrained:
    """The story model after it has learned a few windows by heart, and what edits of one of its weights share."""

    seed: int
    layer: int
    windows: int = 8  # learned by heart; the first half is labelled
    length: int = 48
    until: float = 0.1  # nats a token
    most: int = 300  # steps
    ordinary: int = 160  # windows of ordinary stories
    steps: int = 250  # of a fit of directions
    sae_steps: int = 500

    def __post_init__(self) -> None:
        every = stories.token_windows(stories.load_stories("validation"), 8 * 200, self.length, seed=0, at_start=1.0)
        self.memorised = every[self.windows * (self.seed % 200) :][: self.windows]
        train, test = stories.load_stories("train"), stories.load_stories("test")
        self.train = stories.token_windows(train, self.ordinary, self.length, seed=1, at_start=0.2)
        self.test = stories.token_windows(test, 48, self.length, seed=0, at_start=0.2)
        self.before = stories.load_model()
        self.labelled, self.unlabelled = self.memorised.split(self.windows // 2)
        self.goal = loss_of(self.before, self.labelled).item()
        self.goal_unlabelled = loss_of(self.before, self.unlabelled).item()

    @cached_property
    def model(self) -> Any:
        """The overtrained copy, the edited block's weight written with standard inputs."""
        model = learned_by_heart(self)
        return standardised(model, [self.layer], self.train)

    @cached_property
    def tail(self) -> Tail:
        return Tail(self.model, self.layer)

    @property
    def weight(self) -> str:
        return f"blocks.{self.layer}.mlp.W_in"

    @property
    def parameter(self) -> str:
        return f"inner.{self.weight}"

    @torch.no_grad()
    def entering(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t d"]:
        """What enters the edited block."""
        return cast(Any, self.model)(tokens, stop_at_layer=self.layer)

    def site(self, tokens: Int[Tensor, "n t"]) -> editors.Site:
        """What arrives at the weight and what draws of the model's own outputs ask there."""
        factors = readings.factors(
            self.model, tokens, divergence=ed.KLDivergence(), reference=ed.ModelSample(), parameters=[self.weight]
        )
        return editors.Site(*factors[self.weight])

    @cached_property
    def usual(self) -> editors.Site:
        """The site on ordinary stories."""
        return self.site(self.train)

    @cached_property
    def gradient(self) -> Matrix:
        """G of minus the labelled windows' loss, at unit norm: what edits are to lower is how well they are known."""
        entering, tokens = self.entering(self.labelled), self.labelled
        gradient = moves.gradient(self.tail, entering, lambda f: -next_token_loss(f, tokens), [self.parameter])
        return -gradient[self.parameter]

    @cached_property
    def _rows(self) -> dict[tuple[str, int], tuple[editors.Rows, Tensor]]:
        return {}

    def rows(self, kind: str, n: int) -> tuple[editors.Rows, Float[Tensor, "v v"]]:
        """Rows of rank one, and their Fisher matrix on ordinary stories.

        Directions are of ordinary windows with the memorised among them (``"mixed"``), or of the labelled alone.
        """
        if (kind, n) not in self._rows:
            make = {"sae": self._folded, "random": self._random}.get(kind, lambda n: self._directions(kind, n))
            rows = make(n)
            self._rows[kind, n] = rows, rows.fisher(self.usual)
        return self._rows[kind, n]

    def _directions(self, kind: str, n: int) -> editors.Rows:
        tokens = torch.cat([self.train, self.memorised]) if kind == "mixed" else self.labelled
        d = ed.decompose(
            self.model, tokens, divergence=ed.KLDivergence(), parameters=[self.weight], n_directions=n,
            samples="uses", scale="unit", sparsity=ed.BatchTopK(2 / n), steps=self.steps, batch_size=256,
            learning_rate=1e-2, seed=self.seed, progress=False,
        )  # fmt: skip
        reader, writer = (side(d, tokens[:3], "decoder")[self.weight][:, 0]
                          for side in (readings.readers, readings.writers))  # fmt: skip
        return editors.Rows(reader, writer)

    def _folded(self, n: int) -> editors.Rows:
        x = torch.cat([self.usual.x, self.site(self.memorised).x])
        sae = autoencoders.train(x, n, 2.0, seed=self.seed, steps=self.sae_steps)
        return editors.folded(sae.sae.W_enc.detach().mT, sae.decoder, self.model.get_parameter(self.weight).detach())

    def _random(self, n: int) -> editors.Rows:
        draw = torch.Generator().manual_seed(self.seed)
        return editors.Rows(*(torch.randn(n, k, generator=draw) for k in self.model.get_parameter(self.weight).shape))


def next_token_loss(f: Float[Tensor, "n k"], tokens: Int[Tensor, "w t"]) -> Tensor:
    """The mean negative log-probability of the tokens after the prompt, from the logits at every position."""
    logits = f.unflatten(0, (-1, tokens.shape[1]))[: len(tokens), PROMPT - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, PROMPT:].flatten())


def loss_of(model: nn.Module, tokens: Int[Tensor, "w t"]) -> Tensor:
    """The same of a model."""
    with torch.no_grad():
        return next_token_loss(model(tokens).flatten(0, 1), tokens)


def learned_by_heart(shop: Overtrained) -> Any:
    """A copy trained on the windows, with as many ordinary ones at every step, until it knows them."""
    model: Any = copy.deepcopy(shop.before).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    draw = torch.Generator().manual_seed(shop.seed)
    for _ in range(shop.most):
        some = shop.train[torch.randperm(len(shop.train), generator=draw)[: 2 * shop.windows]]
        f = model(torch.cat([shop.memorised, some]))
        known = next_token_loss(f[: shop.windows].flatten(0, 1), shop.memorised)
        if known.item() <= shop.until:
            break
        usual = F.cross_entropy(f[shop.windows :, :-1].flatten(0, 1), some[:, 1:].flatten())
        optimizer.zero_grad()
        (known + usual).backward()
        optimizer.step()
    return model.eval()


# ---- methods


def filtered(matrix: Matrix, site: editors.Site, share: float) -> Matrix:
    """The part of a matrix in that share of the K-FAC eigenbasis in which curvature is smallest."""
    inputs, a = torch.linalg.eigh(site.inputs)
    outputs, b = torch.linalg.eigh(site.outputs)
    curvature = torch.outer(inputs.clamp_min(0), outputs.clamp_min(0))
    return a @ ((a.mT @ matrix @ b) * (curvature <= curvature.flatten().quantile(share))) @ b.mT


def adapted(shop: Overtrained, penalty: float = 0.0, held: float = 0.0) -> Matrix:
    """LoRA of rank one until the labelled windows' loss is back, with a Fisher penalty or held to ordinary windows."""
    entering, others = shop.entering(shop.labelled), shop.entering(shop.train[:12]) if held else None
    size = entering[..., 0].numel()
    with torch.no_grad():
        base = shop.tail(others).flatten(0, 1).log_softmax(-1) if others is not None else entering

    def loss(f: Float[Tensor, "n k"]) -> Tensor:
        known = -next_token_loss(f[:size], shop.labelled)
        if others is None:
            return known
        return known + held * (base.exp() * (base - f[size:].log_softmax(-1))).sum(-1).mean()

    return editors.learned(
        Target(shop.tail, [shop.parameter]), torch.cat([entering, others]) if others is not None else entering, loss,
        until=-shop.goal, steps=60, learning_rate=3e-2, penalty=penalty, seed=shop.seed,
        fisher=shop.usual.diagonal if penalty else None, writer=torch.linalg.svd(shop.gradient).Vh[0],
    ).change[shop.parameter]  # fmt: skip


def row(shop: Overtrained, kind: str, n: int) -> Matrix:
    """The row that raises the loss most for its cost elsewhere."""
    rows, fisher = shop.rows(kind, n)
    return editors.along_row(shop.gradient, rows, int(editors.candidates(shop.gradient, rows, fisher, 1)[0]))


def span(shop: Overtrained, kind: str, n: int, ridge: float) -> Matrix:
    """The change in the rows' span that raises it most at a given cost."""
    return editors.natural(shop.gradient, *shop.rows(kind, n), ridge)


def change_of(shop: Overtrained, method: str, **s: float) -> Matrix:
    """What a method makes of the labelled windows."""
    g, site, n = shop.gradient, shop.usual, int(s.get("units", 100))
    weight = shop.model.get_parameter(shop.weight).detach()
    ways: dict[str, Callable[[], Tensor]] = {
        "one direction": lambda: row(shop, "mixed", n),
        "one direction of the memorised": lambda: row(shop, "memorised", n),
        "span of directions": lambda: span(shop, "mixed", n, s["ridge"]),
        "span of the memorised": lambda: span(shop, "memorised", n, s["ridge"]),
        "SAE unit, folded": lambda: row(shop, "sae", n),
        "one random row": lambda: row(shop, "random", n),
        "gradient step": lambda: -g,
        "gradient, small curvature": lambda: -filtered(g, site, s["share"]),
        "K-FAC step": lambda: editors.whitened(g, site, s["ridge"]),
        "ROME-like": lambda: editors.rome(g, shop.site(shop.labelled).x.mean(0), site, s["ridge"]),
        "weight, small curvature": lambda: -filtered(weight, site, s["share"]),
        "LoRA, rank 1, Fisher": lambda: adapted(shop, penalty=s["penalty"]),
        "LoRA, rank 1, KL": lambda: adapted(shop, held=s["held"]),
    }
    return ways[method]()


# ---- scores


@dataclass(frozen=True)
class Score:
    """What an edit did once the labelled windows' loss was back at the level before."""

    step: float
    left: float  # of what was learned of the labelled windows, in nats
    unlabelled_left: float  # the same of the windows that the edit has not seen
    verbatim: float  # the share of the labelled windows' tokens that a greedy continuation says, up to its first miss
    damage: float  # KL to the overtrained model on other stories, in nats a token
    worst: float  # the largest mean KL over a concept
    loss: float  # the rise of the loss on other stories, in nats a token


class Bench:
    """Held-out stories of one overtrained model, and the memorised windows."""

    def __init__(self, shop: Overtrained) -> None:
        self.shop = shop
        self.probe = TailProbe(shop.tail, shop.entering(shop.test), log_probabilities)
        rules = concepts.Rules(stories.load_tokenizer())
        self.concepts = rules(shop.test, self.probe.base.unflatten(0, shop.test.shape)).truth
        self.entering = {"labelled": shop.entering(shop.labelled), "unlabelled": shop.entering(shop.unlabelled)}
        self.known = {name: self.loss(shop.tail, name) for name in self.entering}

    def loss(self, model: nn.Module, name: str) -> float:
        """Of the memorised windows."""
        with torch.no_grad():
            f = model(self.entering[name]).flatten(0, 1)
        return next_token_loss(f, getattr(self.shop, name)).item()

    def back(self, model: nn.Module, name: str) -> float:
        """The share of the way from known by heart to the level before."""
        goal = self.shop.goal if name == "labelled" else self.shop.goal_unlabelled
        return (self.loss(model, name) - self.known[name]) / (goal - self.known[name])

    def score(self, move: Move) -> Score | None:
        """At the step at which all is forgotten; None where none does that."""

        def forgotten(step: float) -> Tensor:
            with move(step) as model:
                return torch.tensor(self.back(model, "labelled"))

        reached = moves.matched(forgotten, lambda value: value, 1.0, first=2.0, tolerance=0.02, largest=1e3)
        if reached is None:
            return None
        with move(reached[0]) as model, torch.no_grad():
            logp = self.probe.outputs(model)
            other, verbatim = self.back(model, "unlabelled"), spoken(self.shop.model, self.shop.labelled)
        kl = divergence(self.probe.base, logp - self.probe.base)
        inside = self.concepts.to(kl.dtype)
        worst = (kl @ inside / inside.sum(0).clamp_min(1))[inside.sum(0) >= 20].max().item()
        following = self.shop.test[:, 1:].flatten()
        rise = [F.nll_loss(p.unflatten(0, self.shop.test.shape)[:, :-1].flatten(0, 1), following).item()
                for p in (logp, self.probe.base)]  # fmt: skip
        return Score(reached[0], 1 - reached[1].item(), 1 - other, verbatim, kl.mean().item(), worst, rise[0] - rise[1])


@torch.no_grad()
def spoken(model: nn.Module, tokens: Int[Tensor, "w t"]) -> float:
    """The mean share of the tokens after the prompt that a greedy continuation gets right before its first miss."""
    said = tokens[:, :PROMPT]
    while said.shape[1] < tokens.shape[1]:
        said = torch.cat([said, model(said)[:, -1:].argmax(-1)], 1)
    right = (said[:, PROMPT:] == tokens[:, PROMPT:]).int().cumprod(1)
    return right.double().mean().item()


def numbers(shop: Overtrained, method: str) -> int:
    """How many numbers an edit takes to write down."""
    shape = shop.model.get_parameter(shop.weight).shape
    dense = ("span", "gradient", "K-FAC", "weight")
    return shape.numel() if method.startswith(dense) else sum(shape)


def one(bench: Bench, method: str, **setting: float) -> dict[str, Any]:
    """A row of the table. Scores are None where the edit never reaches its level."""
    shop, start = bench.shop, time.process_time()
    change = change_of(shop, method, **setting)
    seconds = time.process_time() - start
    score = (
        None if not change.norm() > 0 else bench.score(displaced(shop.tail, {shop.parameter: change / change.norm()}))
    )
    result: dict[str, Any] = {"method": method, **{"layer": shop.layer, "seed": shop.seed, "seconds": seconds}}
    result |= {"examples": 0 if method in UNLABELLED else len(shop.labelled), "bytes": 4 * numbers(shop, method)}
    names = Score.__dataclass_fields__
    return result | (dict.fromkeys(names) if score is None else vars(score))


def before(bench: Bench) -> dict[str, Any]:
    """The model before it was overtrained, scored as an edit of all weights: what undoing everything costs."""
    shop = bench.shop
    with torch.no_grad():
        logp = shop.before(shop.test).log_softmax(-1).flatten(0, 1)
    kl = divergence(bench.probe.base, logp - bench.probe.base).mean().item()
    return {"known": bench.known["labelled"], "goal": shop.goal, "spoken": spoken(shop.model, shop.labelled),
            "spoken_before": spoken(shop.before, shop.labelled), "damage": kl}  # fmt: skip


def tuned(benches: Mapping[int, Bench]) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Settings with the least geometric mean damage over these overtrained models, and all that was tried."""
    settings, tried = {}, []
    for method, grid in GRID.items():
        costs: list[float] = []
        for setting in grid if len(grid) > 1 else []:
            scored = [one(bench, method, **setting) for bench in benches.values()]
            damages = [row["damage"] for row in scored]
            reached = all(value is not None for value in damages)
            cost = torch.tensor(damages).log().mean().exp().item() if reached else float("inf")
            costs.append(cost)
            tried.append(
                {"method": method, **setting, "damage": cost if reached else None, "layer": scored[0]["layer"]}
            )
        settings[method] = grid[costs.index(min(costs))] if costs else grid[0]
    return settings, tried
