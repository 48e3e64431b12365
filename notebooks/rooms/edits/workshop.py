"""The story model as it is edited: one MLP weight of a block, labelled examples, dictionaries and held-out stories."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.study import autoencoders, readings
from eigendecomp.study.moves import Probe
from eigendecomp.support.examples import as_examples
from eigendecomp.support.random import generator
from eigendecomp.targets.stories import model as stories
from rooms.edits import behaviours, editors
from rooms.edits.edits import Behaviour, Bench, log_probabilities
from rooms.stories import concepts
from rooms.stories.standardised import standardised

Key = TypeVar("Key")
Value = TypeVar("Value")
KINDS = ("directions", "autoencoder", "random")  # of dictionaries


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

    name: str
    entering: Float[Tensor, "e t d"]
    samples: Int[Tensor, " e"]
    members: Bool[Tensor, " k"]
    met: Float[Tensor, "e d"]

    def loss(self, f: Float[Tensor, "n k"]) -> Tensor:
        """The mean log mass of the members."""
        logp = f[self.samples].log_softmax(-1)
        return logp[:, self.members].logsumexp(-1).mean()


class Made(dict[Key, Value]):
    """What is made when it is first asked for."""

    def __init__(self, make: Callable[[Key], Value]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: Key) -> Value:
        self[key] = self.make(key)
        return self[key]


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
    remade: dict[tuple[str, int, float], tuple[editors.Rows, Tensor]] = field(default_factory=dict)  # rows of others

    def __post_init__(self) -> None:
        self.sizes: dict[str, Sequence[int]] = dict.fromkeys(KINDS, self.units)
        shipped = stories.load_model()
        self.rules = concepts.Rules(stories.load_tokenizer())
        counts: dict[stories.Split, int] = {
            "train": self.fit_windows, "validation": self.held_windows, "test": self.held_windows
        }  # fmt: skip
        self.tokens: dict[str, Tensor] = {
            split: stories.token_windows(stories.load_stories(split), n, self.length, seed=0, at_start=0.1)
            for split, n in counts.items()
        }
        self.model = standardised(shipped, [self.layer], self.tokens["train"][:500])
        self.tail = Tail(self.model, self.layer)
        self.weight, self.site_name = f"blocks.{self.layer}.mlp.W_in", f"blocks.{self.layer}.ln2"
        self.parameter = f"inner.{self.weight}"
        with torch.no_grad():
            self.entering = {k: cast(Any, self.model)(t, stop_at_layer=self.layer) for k, t in self.tokens.items()}
        self.held = {split: held_out(self, split) for split in ("validation", "test")}

    def reseeded(self, seed: int, sizes: Mapping[str, int]) -> Workshop:
        """The same model and stories, with fits of another seed, of one size for each kind of dictionary."""
        _ = self.site, self.shown  # made once, for all seeds
        other = copy.copy(self)
        for name in ("rows", "fishers", "_autoencoders"):
            other.__dict__.pop(name, None)
        other.seed, other.sizes = seed, {kind: [n] for kind, n in sizes.items()}
        other.remade = {}
        return other

    # ---- what edits share

    @cached_property
    def site(self) -> editors.Site:
        """What arrives at the weight, and what draws of the model's own outputs ask of it."""
        factors = readings.factors(
            self.model, self.tokens["train"], divergence=ed.KLDivergence(), reference=ed.ModelSample(),
            parameters=[self.weight],
        )  # fmt: skip
        return editors.Site(*factors[self.weight])

    @cached_property
    def rows(self) -> Made[str, Made[int, editors.Rows]]:
        """Dictionaries of changes of rank one, by kind and size, made when first asked for."""
        kinds = {"directions": self._directions, "autoencoder": self._folded, "random": lambda n: random_rows(self, n)}
        return Made(lambda kind: Made(kinds[kind]))

    def _directions(self, n: int) -> editors.Rows:
        d = ed.decompose(
            self.model, self.tokens["train"], divergence=ed.KLDivergence(), parameters=[self.weight], n_directions=n,
            samples="uses", scale="unit", sparsity=ed.BatchTopK(2 / n), steps=self.steps, batch_size=256,
            learning_rate=1e-2, seed=self.seed, progress=False,
        )  # fmt: skip
        few = self.tokens["train"][:3]
        reader, writer = (side(d, few, "decoder")[self.weight][:, 0] for side in (readings.readers, readings.writers))
        return editors.Rows(reader, writer)

    def _folded(self, n: int) -> editors.Rows:
        sae, weight = self.autoencoder(n), self.model.get_parameter(self.weight).detach()
        return editors.folded(sae.sae.W_enc.detach().mT, sae.decoder, weight)

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
    def fishers(self) -> Made[tuple[str, int], Float[Tensor, "v v"]]:
        """The Fisher matrix within every dictionary's span, by kind and size."""
        return Made(lambda key: self.rows[key[0]][key[1]].fisher(self.site))

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
        return Examples(name, self.entering["train"][window], samples, members, self.site.x[index])


@dataclass(frozen=True)
class Others:
    """Unlabelled training samples that a learned edit is held to the model on: those that do not show a behaviour."""

    entering: Float[Tensor, "w t d"]
    off: Bool[Tensor, " n"]
    logp: Float[Tensor, "n k"]  # of the model as it is

    @classmethod
    @torch.no_grad()
    def of(cls, shop: Workshop, name: str, windows: int = 8) -> Others:
        """Those of as many windows."""
        draw = generator(shop.seed, f"others {name}")
        chosen = torch.randperm(len(shop.entering["train"]), generator=draw)[:windows]
        off = ~shop.shown[name].view(-1, shop.length)[chosen].flatten()
        entering = shop.entering["train"][chosen]
        return cls(entering, off, shop.tail(entering).flatten(0, 1)[off].log_softmax(-1))

    def divergence(self, f: Float[Tensor, "n k"]) -> Tensor:
        """Mean KL(model ‖ moved), in nats a sample, from the moved model's logits."""
        return (self.logp.exp() * (self.logp - f[self.off].log_softmax(-1))).sum(-1).mean()


@torch.no_grad()
def held_out(shop: Workshop, split: str) -> Held:
    """The bench of a split's stories."""
    tokens = shop.tokens[split]
    probe = TailProbe(shop.tail, shop.entering[split], log_probabilities)
    told = shop.rules(tokens, probe.base.unflatten(0, tokens.shape))
    scored = behaviours.behaviours(shop.rules, probe.base, behaviours.SCORED | behaviours.TUNING)
    return Held(Bench(probe, tokens.flatten(), told.truth), {one.name: one for one in scored})


def random_rows(shop: Workshop, n: int) -> editors.Rows:
    """Rows of rank one that nothing was learned from."""
    draw = generator(shop.seed, "random rows")
    reader, writer = (torch.randn(n, k, generator=draw) for k in shop.model.get_parameter(shop.weight).shape)
    return editors.Rows(reader, writer)
