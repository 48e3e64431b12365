"""Behaviours of the story model that edits take away, told by rules: what it puts at least half of its mass on."""

from jaxtyping import Float
from torch import Tensor

from rooms.edits.edits import Behaviour
from rooms.stories.concepts import Rules

SCORED = {
    "she, her": "she, her",
    "he, him, his": "he, him, his",
    "closes a quotation": "closing quotation mark",
    "opens a quotation": "opening quotation mark",
    "Lily": "Lily",
    "a boy's name": "boy's name",
    "an animal": "animal",
    "the family": "family",
    "an emotion": "emotion",
    "the": "the",
    "and": "and",
    "ends a paragraph": "line break",
}
TUNING = {"comma": "comma", "to": "to"}  # hyperparameters are chosen on these, which are not scored


def behaviours(rules: Rules, logp: Float[Tensor, "n k"], named: dict[str, str] = SCORED) -> list[Behaviour]:
    """Each behaviour with the samples, of these log-probabilities, on which it has half of the mass or more."""
    shown = []
    for name, words in named.items():
        members = rules.sets[words] if words in rules.sets else rules.words(words)
        shown.append(Behaviour(name, logp[:, members].exp().sum(-1) >= 0.5, members))
    return shown
