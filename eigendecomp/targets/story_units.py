"""Units of a story model, of whatever kind: their contexts, what they promote, and whom a push along them reaches."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from eigendecomp.decomposition import Decomposition
from eigendecomp.interventions import Move, Probe
from eigendecomp.metrics import cosines
from eigendecomp.targets import stories


@dataclass
class Reach:
    """What a push does where it is meant and elsewhere: mean total variation of next-token distributions."""

    step: float
    on: float
    off: float
    toward: Float[Tensor, " k"]  # mean change of every token's probability where it is meant

    @property
    def selectivity(self) -> float:
        """The change where it is meant over that elsewhere."""
        return self.on / max(self.off, 1e-9)


def push(
    probe: Probe, move: Move, on: Bool[Tensor, " n"], level: float, *, first: float = 0.1, tries: int = 10
) -> Reach | None:
    """Move along until the mean total variation at the positions ``on`` is ``level``, to 5%; its sign is that of
    ``first``. None where ``tries`` steps do not come there. The probe's view must be probabilities.
    """
    low, high, step = (0.0, 0.0), (math.inf, math.inf), first  # steps, and what they reach
    for _ in range(tries):
        with move(step) as model:
            moved = probe.outputs(model) - probe.base
        effect = moved.abs().sum(-1) / 2
        reached = effect[on].mean().item()
        if abs(reached - level) <= 0.05 * level:
            return Reach(step, reached, effect[~on].mean().item(), moved[on].mean(0))
        low, high = ((step, reached), high) if reached < level else (low, (step, reached))
        if math.isinf(high[0]) or low[1] <= 0:  # effects start in proportion: go as far as that says, within bounds
            step *= min(8.0, max(0.125, level / max(reached, 1e-9)))
        else:
            slope = math.log(high[0] / low[0]) / math.log(high[1] / low[1])
            step = low[0] * (level / low[1]) ** slope
    return None


def pushed_both_ways(probe: Probe, move: Move, on: Bool[Tensor, " n"], level: float, *, first: float) -> Reach | None:
    """:func:`push` with either sign; the more selective of the two."""
    found = [reach for sign in (1, -1) if (reach := push(probe, move, on, level, first=sign * first)) is not None]
    return max(found, key=lambda reach: reach.selectivity, default=None)


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


def found_again(a: Float[Tensor, "v d"], b: Float[Tensor, "w d"], least: float = 0.8) -> float:
    """The share of the rows of ``a`` that have a row of ``b`` with |cosine| of at least ``least``."""
    return (cosines(a, b).abs().amax(1) >= least).double().mean().item()


def contexts(tokens: Int[Tensor, "n t"], scores: Float[Tensor, " n·t"], k: int) -> list[tuple[str, str, str, float]]:
    """The k strongest positions, of different windows: words before, the token, words after, the score."""
    best, where = scores.view(tokens.shape).max(1)
    value, window = best.topk(k)
    rows = zip(window.tolist(), value.tolist(), strict=True)
    return [(*stories.token_context(tokens[n], int(where[n]), before=5, after=2), float(score)) for n, score in rows]


def bold(context: tuple[str, str, str, float]) -> str:
    """One context in markdown: the token in bold, then its score."""
    before, token, after = (part.replace("|", "\\|").replace("*", "\\*") for part in context[:3])
    space = " " if token[:1] == " " else ""
    return f"{before}{space}**{token.strip()}**{after} ({context[3]:.1f})"


def promoted(probe: Probe, move: Move, step: float, on: Bool[Tensor, " n"], k: int = 5) -> tuple[list[str], list[str]]:
    """The next tokens whose probability a step raises, and lowers, most on average at the positions ``on``."""
    with move(step) as model:
        change = (probe.outputs(model) - probe.base)[on].mean(0)
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
