"""In which attention heads behaviours of the story model lie: by their gradients, and by ablating heads."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from rooms.stories.rivals import Story

LETTERS = "QKVO"


def energy(story: Story, part: str) -> Float[Tensor, "b heads"]:
    """The share of every behaviour's gradient, in all attention weights, that each head holds: block by block.

    A share is of the squared norm in W_Q, W_K, W_V and W_O together.
    """
    cfg = cast(Any, story.model).cfg
    names = [f"blocks.{block}.attn.W_{letter}" for block in range(cfg.n_layers) for letter in LETTERS]
    rows = []
    for gradients in story.wanting(part, names).values():
        by_weight = torch.stack([g.square().flatten(1).sum(1) for g in gradients])  # (blocks · letters, heads)
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
    entering = [model(tokens, stop_at_layer=block) for block in range(1, cfg.n_layers)]
    entering = [model(tokens, stop_at_layer=0), *entering]

    def masses(x: Tensor, block: int) -> Tensor:
        stream = model(x, start_at_layer=block, stop_at_layer=cfg.n_layers)
        masses = []
        for name, where in on.items():
            logp = model.unembed(model.ln_final(stream[where].unsqueeze(0)))[0].log_softmax(-1)
            masses.append(logp[:, story.rules.sets[name]].logsumexp(-1).mean())
        return torch.stack(masses)

    base, rows = masses(entering[-1], cfg.n_layers - 1), []
    for block in range(cfg.n_layers):
        for head in range(cfg.n_heads):

            def ablate(_module: object, _inputs: object, z: Tensor, head: int = head) -> Tensor:
                z = z.clone()
                z[:, :, head] = z[:, :, head].mean((0, 1))
                return z

            handle = model.blocks[block].attn.hook_z.register_forward_hook(ablate)
            try:
                rows.append(base - masses(entering[block], block))
            finally:
                handle.remove()
    return torch.stack(rows, 1)


def rank_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's, of numbers without ties."""
    ranks = torch.stack([a, b]).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()
