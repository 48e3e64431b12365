"""Units of the story model, of many kinds, at two sites: directions of a weight, and what they are compared with.

All kinds see the same inputs of the same training tokens. A kind gives rows that are applied to what arrives
(readers), for most with what is written for it (writers, so that reader ⊗ writer is a change of the weight), and some
give scores of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

import eigendecomp as ed
from eigendecomp.study import autoencoders, clusters, readings
from eigendecomp.study import concepts as resolution
from eigendecomp.support.random import generator
from eigendecomp.targets.stories import model as stories
from rooms.stories import concepts
from rooms.stories.standardised import activations, standardised

GROUP = {"*.W_[QKV]": "head d_model d_head -> (head d_head) d_model"}  # rank one is that of a matrix
PARTS: dict[str, stories.Split] = {"fit": "train", "choose": "validation", "test": "test"}
SITES = {"W_K": "blocks.4", "W_V": "blocks.5"}  # by the weight's name: its block
LETTERS = "QKVO"  # of the attention weights
HELD = ("choose", "test")  # the held-out splits that decide which concepts and behaviours there are
HALF = 0.5  # of the probability: the model is about to do something
COUNTS = (1, 5, 20)  # rows that rebuild a behaviour's gradient

Setting = Mapping[str, Any]


@dataclass
class Site:
    """A weight: what arrives at it in every split, and what arrives and is asked at training tokens, at unit norm."""

    weight: str
    x: dict[str, Float[Tensor, "n in"]]
    given: Float[Tensor, "n in"]
    asked: Float[Tensor, "n out"]


@dataclass
class Story:
    """The model written with standard inputs, its stories in three splits, and what is known of the held-out two."""

    fit_windows: int = 1000
    held_windows: int = 256
    behaving_windows: int = 256  # of which behaviours' gradients are taken
    length: int = 32
    least: int = concepts.LEAST
    fresh_windows: int = 0  # of other test stories than those of the split "test"

    def __post_init__(self) -> None:
        counts = {"fit": self.fit_windows, "choose": self.held_windows, "test": self.held_windows + self.fresh_windows}
        self.tokens = {
            part: stories.token_windows(stories.load_stories(split), counts[part], self.length, seed=7)
            for part, split in PARTS.items()
        }
        if self.fresh_windows:  # stories are drawn in an order, each once
            self.tokens["test"], self.tokens["fresh"] = self.tokens["test"].tensor_split([self.held_windows])
        self.rules = concepts.Rules(stories.load_tokenizer())
        blocks = [int(block.split(".")[1]) for block in SITES.values()]
        self.model = standardised(stories.load_model(), blocks, self.tokens["fit"][:500])
        self._wanting: dict[str, dict[str, dict[str, Tensor]]] = {}

    @cached_property
    def logits(self) -> dict[str, Float[Tensor, "n t k"]]:
        """The model's, on held-out stories."""
        with torch.no_grad():
            return {part: torch.cat([cast(Any, self.model)(x) for x in self.tokens[part].split(128)])
                    for part in self.tokens if part != "fit"}  # fmt: skip

    @cached_property
    def known(self) -> dict[str, concepts.Concepts]:
        """The concepts that hold often enough in the splits "choose" and "test"."""
        told = {part: self.rules(self.tokens[part], logits) for part, logits in self.logits.items()}
        by_split: dict[str, concepts.Concepts] = dict(
            zip(HELD, concepts.common(*(told[part] for part in HELD), least=self.least), strict=True)
        )
        names = list(zip(by_split["test"].families, by_split["test"].names, strict=True))
        for part in told.keys() - by_split.keys():
            place = {name: i for i, name in enumerate(zip(told[part].families, told[part].names, strict=True))}
            by_split[part] = told[part].select([place[name] for name in names])
        return by_split

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The sites of all weights, from the same passes through the model."""
        weights = {name: f"{block}.attn.{name}" for name, block in SITES.items()}
        modules = {name: f"{block}.ln1" for name, block in SITES.items()}
        x = {part: activations(self.model, tokens, list(modules.values()))
             for part, tokens in self.tokens.items()}  # fmt: skip
        pairs = readings.factors(
            self.model, self.tokens["fit"], divergence=ed.KLDivergence(), parameters=list(weights.values()), group=GROUP
        )
        return {
            name: Site(weight, {part: found[modules[name]] for part, found in x.items()},
                       *(normalize(side, dim=1) for side in pairs[weight]))
            for name, weight in weights.items()
        }  # fmt: skip

    def site(self, name: str) -> Site:
        """The site of a weight."""
        return self.sites[name]

    # ---- behaviours

    @cached_property
    def behaving(self) -> dict[str, dict[str, Bool[Tensor, "n t"]]]:
        """Where the model puts at least half of its probability on a set of tokens, by split and the set's name.

        Sets for which it does so at fewer than ``least`` tokens of "choose" or "test" are left out.
        """
        says = {}
        for part, f in self.logits.items():
            p = f[: self.behaving_windows].softmax(-1)
            says[part] = {name: p[..., members].sum(-1) >= HALF for name, members in self.rules.sets.items()}
        enough = [name for name in self.rules.sets if all(int(says[part][name].sum()) >= self.least for part in HELD)]
        return {part: {name: one[name] for name in enough} for part, one in says.items()}

    def wanting(self, part: str) -> dict[str, dict[str, Tensor]]:
        """{behaviour: its gradient in every attention weight}, made once for a split.

        The gradient is that of the mean log mass of its set where the model is about to show it; windows in which it
        is nowhere about to are left out.
        """
        if part in self._wanting:
            return self._wanting[part]
        model, tokens = cast(Any, self.model), self.tokens[part][: self.behaving_windows]
        names = [f"blocks.{block}.attn.W_{letter}" for block in range(model.cfg.n_layers) for letter in LETTERS]
        parameters = [model.get_parameter(name) for name in names]
        needed, found = [p.requires_grad for p in parameters], {}
        try:
            for p in parameters:
                p.requires_grad_()
            with torch.enable_grad():
                for name, on in self.behaving[part].items():
                    some = on.any(1)
                    stream = model(tokens[some], stop_at_layer=model.cfg.n_layers)[on[some]]
                    logp = model.unembed(model.ln_final(stream.unsqueeze(0)))[0].log_softmax(-1)
                    mass = logp[:, self.rules.sets[name]].logsumexp(-1).mean()
                    found[name] = dict(zip(names, torch.autograd.grad(mass, parameters), strict=True))
        finally:
            for p, need in zip(parameters, needed, strict=True):
                p.requires_grad_(need)
        self._wanting[part] = found
        return found

    def gradients(self, part: str, name: str) -> Float[Tensor, "b in*out"]:
        """Every behaviour's gradient in a weight on a split, as rows of the flattened matrix."""
        weight = f"{SITES[name]}.attn.{name}"
        rows = torch.stack([gradient[weight] for gradient in self.wanting(part).values()])  # (b, head, in, d_head)
        return rows.movedim(2, 1).flatten(2).flatten(1)


@dataclass
class Units:
    """Rows of one kind, and how they are read."""

    readers: dict[str, Float[Tensor, "v in"]]  # by the side that they come from
    writers: Float[Tensor, "v out"] | None = None  # of the first side
    signed: bool = False  # whether the rows' signs mean something
    codes: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    fit: ed.Decomposition | None = None

    @property
    def ways(self) -> list[str]:
        """The readings there are."""
        return [*self.readers, *self.codes]

    def scores(self, way: str, x: Mapping[str, Float[Tensor, "n in"]]) -> dict[str, Float[Tensor, "n v"]]:
        """One reading of what arrives in some splits; arbitrary signs are turned by the split ``choose``."""
        if way in self.codes:
            return {part: self.codes[way](rows) for part, rows in x.items()}
        rows = normalize(self.readers[way], dim=1)
        codes = {part: y @ rows.T for part, y in x.items()}
        if self.signed:
            return codes
        return {part: resolution.oriented(z, on=codes["choose"]) for part, z in codes.items()}

    def changes(self) -> Float[Tensor, "v in*out"]:
        """reader ⊗ writer at unit norm."""
        assert self.writers is not None
        first = next(iter(self.readers.values()))
        return normalize(torch.einsum("vi,vo->vio", first, self.writers).flatten(1), dim=1)


# ------------------------------------------------------------------------------------------------------- kinds


def directions(story: Story, name: str, size: int, seed: int, setting: Setting) -> Units:
    """Directions of the weight, by the package's front door."""
    weight = story.site(name).weight
    d = ed.decompose(
        story.model, story.tokens["fit"], divergence=ed.KLDivergence(), parameters=[weight], n_directions=size,
        samples="uses", scale="unit", group=GROUP, sparsity=ed.BatchTopK(setting["kept"] / size),
        steps=setting["steps"], batch_size=256, learning_rate=1e-2, seed=seed, progress=False,
    )  # fmt: skip
    few = story.tokens["fit"][:3]
    rows = {side: readings.readers(d, few, side)[weight][:, 0] for side in ("decoder", "encoder")}
    return Units(rows, readings.writers(d, few, "decoder")[weight][:, 0], fit=d)


def autoencoder(story: Story, name: str, size: int, seed: int, setting: Setting) -> Units:
    """An autoencoder of what arrives; its units' changes have the mean of what is asked where they are on."""
    site = story.site(name)
    a = autoencoders.train(site.x["fit"], size, setting["kept"], seed=seed, steps=setting["steps"])
    asked = torch.zeros(size, site.asked.shape[1])
    for x, wanted in zip(site.x["fit"].split(8192), site.asked.split(8192), strict=True):
        asked += a.encode(x).T @ wanted
    codes = {"before its threshold": a.before_threshold, "code": a.encode}
    return Units({"decoder": a.decoder}, asked, signed=True, codes=codes)


def input_clusters(story: Story, name: str, size: int, seed: int, setting: Setting) -> Units:
    """k-means of inputs; a centre's change has the mean of what is asked of its cluster."""
    site = story.site(name)
    centres, nearest = clusters.inputs(site.x["fit"], size, seed=seed, restarts=setting["restarts"])
    asked = torch.zeros(size, site.asked.shape[1]).index_add_(0, nearest, site.asked)
    return Units({"centre": centres}, asked, signed=True)


def gradient_clusters(story: Story, name: str, size: int, seed: int, setting: Setting) -> Units:
    """k-means of single gradients, with centres of rank one."""
    site = story.site(name)
    a, b = clusters.gradients(
        site.given, site.asked, size, seed=seed, signed=setting["signed"], by_input=setting["by_input"]
    )
    return Units({"centre": a}, b, signed=setting["signed"])


def training_inputs(story: Story, name: str, size: int, seed: int, setting: Setting) -> Units:
    """What arrives at training tokens drawn at random; their changes are single gradients."""
    site = story.site(name)
    at = torch.randperm(len(site.given), generator=generator(seed, "training inputs"))[:size]
    return Units({"input": site.given[at]}, site.asked[at], signed=True)


def random_rows(story: Story, name: str, size: int, seed: int, setting: Setting) -> Units:
    """Rows that nothing was learned from."""
    site, draw = story.site(name), generator(seed, "random rows")
    reader, writer = (torch.randn(size, side.shape[1], generator=draw) for side in (site.given, site.asked))
    return Units({"row": reader}, writer)


def principal(story: Story, name: str, size: int, seed: int, setting: Setting) -> Units:
    """Principal components of inputs: as many as there are dimensions, at most."""
    x = story.site(name).x["fit"]
    return Units({"component": torch.linalg.eigh(x.T @ x).eigenvectors.flip(1).T[:size]})


KINDS = {
    "directions": directions, "SAE": autoencoder, "k-means of inputs": input_clusters,
    "k-means of gradients": gradient_clusters, "training inputs": training_inputs, "random rows": random_rows,
    "PCA": principal,
}  # fmt: skip


def of_tokens(story: Story, size: int) -> dict[str, Float[Tensor, "n v"]]:
    """A unit for each of the commonest training tokens, which is on where the token is."""
    often = torch.bincount(story.tokens["fit"].flatten()).argsort(descending=True)[:size]
    return {part: (story.tokens[part].flatten()[:, None] == often).float() for part in story.logits}


def of_probes(
    story: Story, name: str, penalties: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0), part: str = "test"
) -> Tensor:
    """The scores, in a split, of linear probes, one a concept, learned from the labels of validation stories.

    The penalty is the best of these between two halves of the validation stories.
    """
    x, y = story.site(name).x, story.known["choose"].truth.float()
    half = len(y) // 2

    def learned(rows: Tensor, labels: Tensor, penalty: float) -> Tensor:
        square = rows.T @ rows + penalty * torch.eye(rows.shape[1])
        return torch.linalg.solve(square, rows.T @ (labels - labels.mean(0)))

    truth = story.known["choose"].truth[half:]
    some = truth.any(0)
    tried = {p: precision_of((x["choose"][half:] @ learned(x["choose"][:half], y[:half], p))[:, some], truth[:, some])
             .mean().item() for p in penalties}  # fmt: skip
    return x[part] @ learned(x["choose"], y, max(tried, key=lambda p: tried[p]))


# ------------------------------------------------------------------------------------------------------ scores


def few(z: Float[Tensor, "n v"], kept: int) -> Float[Tensor, "n v"]:
    """Only the ``kept`` largest of a token, where they are positive; the rest is zero."""
    kept = min(kept, z.shape[1])
    return z.where(z >= z.topk(kept, 1).values[:, -1:], 0.0).clamp_min(0)


def precision_of(scores: Float[Tensor, "n m"], truth: Bool[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """The average precision of each score for its own concept."""
    each = range(truth.shape[1])
    return torch.stack([resolution.average_precision(scores[:, [m]], truth[:, [m]])[0, 0] for m in each])


def resolved(
    story: Story, z: Mapping[str, Float[Tensor, "n v"]], kept: int | None = None, part: str = "test"
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"], Int[Tensor, " m"]]:
    """Each concept's best unit on validation stories: its precision there, on the split ``part``, and which it is.

    With ``kept`` a unit counts only where it is among so many of a token. Without scores of that split, none is given.
    """
    known = story.known
    scores = {part: y if kept is None else few(y, kept) for part, y in z.items()}
    precision = resolution.average_precision(scores["choose"], known["choose"].truth)
    best = precision.argmax(0)
    held = precision_of(scores[part][:, best], known[part].truth) if part in scores else torch.zeros(0)
    return precision.amax(0), held, best
