"""In which attention heads behaviours of the story model lie: by their gradients, and by ablating heads."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from rooms.stories.rivals import LETTERS, Story
from rooms.stories.standardised import activations


def energy(story: Story, part: str) -> Float[Tensor, "b heads"]:
    """The share of every behaviour's gradient, in all attention weights, that each head holds: block by block.

    A share is of the squared norm in W_Q, W_K, W_V and W_O together.
    """
    rows = []
    for gradients in story.wanting(part).values():
        by_weight = torch.stack([g.square().flatten(1).sum(1) for g in gradients.values()])  # (blocks · letters, heads)
        rows.append(by_weight.unflatten(0, (-1, len(LETTERS))).sum(1).flatten())
    energies = torch.stack(rows)
    return energies / energies.sum(1, keepdim=True)


@torch.no_grad()
def drops(story: Story, part: str) -> Float[Tensor, "b heads"]:
    """By how much a behaviour's mean log mass falls, where it is about to be shown, if a head gives its mean instead.

    The mean is that over all tokens of these stories. Heads are in the order of :func:`energy`.
    """
    model, cfg = cast(Any, story.model), cast(Any, story.model).cfg
    tokens, on = story.tokens[part][: story.behaving_windows], story.behaving[part]

    def masses(x: Tensor, block: int) -> Tensor:
        """Of every behaviour, given what enters a block; of the last, what leaves it."""
        stream = model(x, start_at_layer=block, stop_at_layer=cfg.n_layers) if block < cfg.n_layers else x
        masses = []
        for name, where in on.items():
            logp = model.unembed(model.ln_final(stream[where].unsqueeze(0)))[0].log_softmax(-1)
            masses.append(logp[:, story.rules.sets[name]].logsumexp(-1).mean())
        return torch.stack(masses)

    points = [f"blocks.{i}.{point}" for i in range(cfg.n_layers) for point in ("hook_resid_mid", "attn.hook_z")]
    found = {name: x.unflatten(0, tokens.shape) for name, x in activations(model, tokens, points).items()}
    base, rows = masses(model(tokens, stop_at_layer=cfg.n_layers), cfg.n_layers), []
    for i, block in enumerate(model.blocks):
        middle, z = (found[f"blocks.{i}.{point}"] for point in ("hook_resid_mid", "attn.hook_z"))
        for less, weight in zip((z.mean((0, 1)) - z).unbind(2), block.attn.W_O, strict=True):
            x = middle + less @ weight  # the attention is not run again: all other heads' parts are the same
            rows.append(base - masses(x + block.mlp(block.ln2(x)), i + 1))
    return torch.stack(rows, 1)


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's, of numbers without ties."""
    ranks = torch.stack([a, b]).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()
