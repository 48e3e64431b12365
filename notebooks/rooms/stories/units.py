"""Units of a story model, of whatever kind: their contexts, what they promote, and whom a push along them reaches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from eigendecomp.decomposition import Decomposition
from eigendecomp.study.moves import Move, Probe
from eigendecomp.study.scores import cosines
from eigendecomp.support.examples import as_examples
from eigendecomp.targets.stories import model as stories

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerFast


@dataclass
class FromBlock(Probe):
    """A probe of a ``HookedTransformer`` whose inputs are what enters a block, so that earlier ones need not run.

    It sees moves of this block and later ones.
    """

    layer: int = 0

    def run(self, model: nn.Module) -> Float[Tensor, "m k"]:
        """The model's outputs from that block on."""
        (x,) = as_examples(self.inputs)
        return model(x, start_at_layer=self.layer).flatten(0, 1)


def gated(d: Decomposition, layer: int, unit: int, reader: Float[Tensor, " width"], threshold: float) -> Move:
    """δ ↦ the model with a direction's step taken only at the tokens whose reading is ``threshold`` or more.

    Queries, keys and values of such a token change by δ times what the direction's part in their weights makes of what
    arrives there; those of all other tokens do not. The model is a ``HookedTransformer``.
    """
    model = d.target.model
    norm = model.get_submodule(f"blocks.{layer}.ln1")
    one = d.decoder.select([unit])
    names = {letter: f"blocks.{layer}.attn.W_{letter}" for letter in "QKV"}
    rows = {letter: one.dense(name)[0] for letter, name in names.items() if name in one.shapes}

    @contextmanager
    def move(delta: float) -> Iterator[nn.Module]:
        met: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, x: Tensor) -> None:
            met[:] = [x * (x @ reader >= threshold).unsqueeze(-1)]

        def add(row: Tensor, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            return output + delta * torch.einsum("btd,hde->bthe", met[0], row)

        handles = [norm.register_forward_hook(keep)]
        for letter, row in rows.items():
            point = model.get_submodule(f"blocks.{layer}.attn.hook_{letter.lower()}")
            handles.append(point.register_forward_hook(partial(add, row)))
        try:
            yield model
        finally:
            for handle in handles:
                handle.remove()

    return move


def strongest(scores: Float[Tensor, " n"], share: float) -> Bool[Tensor, " n"]:
    """The share of the samples with the largest scores, those above the least alone."""
    count = max(1, round(share * len(scores)))
    on = torch.zeros(len(scores), dtype=torch.bool)
    on[scores.topk(count).indices] = True
    return on & (scores > scores.min())


def found_again(a: Float[Tensor, "v d"], b: Float[Tensor, "w d"]) -> float:
    """The share of the rows of ``a`` that have a row of ``b`` with |cosine| of at least 0.8."""
    return (cosines(a, b).abs().amax(1) >= 0.8).double().mean().item()


def token_context(
    tokens: Int[Tensor, " positions"], position: int, before: int = 6, after: int = 3
) -> tuple[str, str, str]:
    """What a table shows of one position: up to ``before`` words, the token itself, up to ``after`` words.

    The three strings joined are a readable piece of the window, spaces included; ``…`` stands for what is left out
    within the window.

    Raises:
        ValueError: if the window has no such position.
    """
    ids = tokens.tolist()
    if not -len(ids) <= position < len(ids):
        raise ValueError(f"position is {position}; the window has {len(ids)} positions")
    position %= len(ids)
    tokenizer = stories.load_tokenizer()
    left, right = text(ids[:position], tokenizer), text(ids[position + 1 :], tokenizer)
    words = re.findall(r"\s*\S+\s*$|\s*\S+", left)
    if len(words) > before:
        left = "…" + "".join(words[len(words) - before :])
    words = re.findall(r"^\S+|\s+\S+", right)
    if len(words) > after:
        right = "".join(words[:after]) + " …"
    return left, stories.readable(ids[position], tokenizer), right


def text(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Tokens as ``readable`` shows them, but decoded together, so that split characters come out whole."""
    if ids and ids[0] in tokenizer.all_special_ids:
        return "[start] " + text(ids[1:], tokenizer)
    return str(tokenizer.decode(ids)).replace("\n", "¶")


def contexts(tokens: Int[Tensor, "n t"], scores: Float[Tensor, " n·t"], k: int) -> list[tuple[str, str, str, float]]:
    """The k strongest positions, of different windows: words before, the token, words after, the score."""
    best, where = scores.view(tokens.shape).max(1)
    value, window = best.topk(k)
    rows = zip(window.tolist(), value.tolist(), strict=True)
    return [(*token_context(tokens[n], int(where[n]), before=5, after=2), float(score)) for n, score in rows]


def bold(context: tuple[str, str, str, float]) -> str:
    """One context in markdown: the token in bold, then its score."""
    before, token, after = (part.replace("|", "\\|").replace("*", "\\*") for part in context[:3])
    space = " " if token[:1] == " " else ""
    return f"{before}{space}**{token.strip()}**{after} ({context[3]:.1f})"


def promoted(probe: Probe, move: Move, step: float, on: Bool[Tensor, " n"], k: int = 5) -> tuple[list[str], list[str]]:
    """The next tokens whose probability a step raises, and lowers, most on average at the positions ``on``."""
    change = probe.among(on).moved(move, step).mean(0)
    up, down = change.topk(k).indices.tolist(), (-change).topk(k).indices.tolist()
    return [stories.readable(i) for i in up], [stories.readable(i) for i in down]


def heads(d: Decomposition) -> Float[Tensor, "v heads"]:
    """The share of each direction's squared norm in every attention head, over all decomposed attention weights."""
    total = sum(d.decoder.dense(name).square().flatten(2).sum(2) for name in d.decoder.shapes if ".attn.W_" in name)
    assert isinstance(total, Tensor)
    return total / total.sum(1, keepdim=True)


def markdown(table: pd.DataFrame, columns: Sequence[str]) -> str:
    """A table in markdown."""
    head = "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n"
    rows = ["| " + " | ".join(str(row[column]) for column in columns) + " |" for _, row in table.iterrows()]
    return head + "\n".join(rows)
