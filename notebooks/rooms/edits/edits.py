"""What an edit of the weights is worth: scored at equal success, by all that it does elsewhere.

A *behaviour* is a set of samples on which a model puts mass on some of its outputs. An edit is a move
(:mod:`eigendecomp.study.moves`) along a ray of weights, and is carried on until the mass on held-out samples is down to
a level. What it costs is the divergence between the model and its edited copy on all samples that do not show the
behaviour: on average, on the concept that suffers most, and on the same words in other contexts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eigendecomp.study.moves import Move, Probe, matched


@dataclass(frozen=True)
class Behaviour:
    """Samples on which a model puts mass on some outputs, the members."""

    name: str
    on: Bool[Tensor, " n"]
    members: Bool[Tensor, " k"]


@dataclass(frozen=True)
class Score:
    """What an edit did when the behaviour's mass was down to the level asked for; divergences in nats a sample."""

    step: float
    left: float  # the share of the mass that is left on the samples of which the step was chosen
    damage: float  # mean KL over all samples without the behaviour
    worst: float  # the largest mean KL over a concept's samples without the behaviour
    same_words: float  # mean KL over the words at which the behaviour shows, in other contexts; NaN if there are none


def log_probabilities(logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """The view of a probe on which edits are scored."""
    return logits.log_softmax(-1)


def mass(logp: Float[Tensor, "n k"], members: Bool[Tensor, " k"]) -> Float[Tensor, ""]:
    """The mean probability of the members."""
    return logp[:, members].exp().sum(-1).mean()


def divergence(logp: Float[Tensor, "n k"], change: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """KL(p ‖ q) of every sample, from log p and log q − log p."""
    return -(logp.exp() * change).sum(-1)


class Bench:
    """Held-out samples on which edits are scored.

    Args:
        probe: the samples; its view must be :func:`log_probabilities`.
        words: what each sample is an occurrence of.
        concepts: what each sample has, a column a concept; those with fewer than ``least`` samples do not count.
        most: the step is chosen on at most so many of a behaviour's samples, evenly spaced.

    Raises:
        ValueError: if words or concepts are not of the probe's samples.
    """

    def __init__(
        self, probe: Probe, words: Int[Tensor, " n"], concepts: Bool[Tensor, "n m"], *, least: int = 20, most: int = 32
    ) -> None:
        for name, rows in (("words", words), ("concepts", concepts)):
            if len(rows) != len(probe.base):
                raise ValueError(f"{name} has {len(rows)} rows, but the probe has {len(probe.base)} samples")
        self.probe, self.words, self.concepts, self.least, self.most = probe, words, concepts, least, most

    def shown(self, behaviour: Behaviour) -> Probe:
        """The probe of the samples on which a step is chosen.

        Raises:
            ValueError: if there are none.
        """
        index = behaviour.on.nonzero()[:, 0]
        if not len(index):
            raise ValueError(f"no sample shows {behaviour.name!r}, so its mass cannot be lowered")
        some = torch.zeros_like(behaviour.on)
        some[index[torch.linspace(0, len(index) - 1, min(self.most, len(index))).long()]] = True
        return self.probe.among(some)

    def score(
        self, move: Move, behaviour: Behaviour, level: float = 0.5, *, first: float = 2.0, largest: float = 1e3
    ) -> Score | None:
        """Move until ``level`` of the mass is left, and see what that does; None where no step does it."""
        shown = self.shown(behaviour)
        start = mass(shown.base, behaviour.members)
        reached = matched(
            lambda step: shown.moved(move, step),
            lambda change: 1 - mass(shown.base + change, behaviour.members) / start,
            1 - level, first=first, tolerance=0.02, largest=largest,
        )  # fmt: skip
        if reached is None:
            return None
        step, change = reached
        left = mass(shown.base + change, behaviour.members) / start
        return Score(step, left.item(), *self.damage(move, step, behaviour))

    def damage(self, move: Move, step: float, behaviour: Behaviour) -> tuple[float, float, float]:
        """The three damages of :class:`Score` at a step."""
        kl = divergence(self.probe.base, self.probe.moved(move, step))
        off = ~behaviour.on
        inside = (self.concepts & off.unsqueeze(1)).to(kl.dtype)
        counts = inside.sum(0)
        each = (kl @ inside / counts.clamp_min(1))[counts >= self.least]
        same = off & torch.isin(self.words, self.words[behaviour.on])
        return kl[off].mean().item(), each.max().item() if len(each) else float("nan"), kl[same].mean().item()
