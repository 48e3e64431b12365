"""A file from which directions can be labelled, and labels tested, by people or by models; nothing is called."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from eigendecomp.decomposition import Decomposition
from eigendecomp.share.readout import Names
from eigendecomp.support import files
from eigendecomp.support.checks import whole
from eigendecomp.support.examples import Examples, Inputs, count, fetch, first
from eigendecomp.support.random import generator


def explain(
    d: Decomposition,
    path: str | Path,
    inputs: Inputs,
    names: Names | None = None,
    k: int = 5,
    seed: int = 0,
    *,
    window: int = 32,
    references: int = 16,
) -> Path:
    """Write JSON lines, one a direction: its top and middling contexts by impact, and an intruder to be found.

    A context is the ``window`` tokens up to a sample's own, or the example's values where inputs are no tokens. In
    ``intruder``, ``contexts`` are the top ones and one of the least impact, in random order; ``answer`` is its index.
    It is null where no sample of the least impact reads differently.

    Raises:
        ValueError: if there are fewer than 4k samples, or inputs whose number nobody knows.
    """
    path = files.writable(path)
    for name, value, least in (("k", k, 1), ("window", window, 1), ("seed", seed, 0)):
        whole(name, value, least)
    n = count(inputs)
    if n is None:
        raise ValueError("inputs of unknown number cannot be looked up again; give tensors or a map-style dataset")
    shown = Contexts(inputs, d.target.outputs(first(inputs, 1)).shape[1], names, window)
    if n * shown.positions < 4 * k:
        raise ValueError(f"{n * shown.positions} samples are too few for k={k}; give at least {4 * k}, or a smaller k")
    impact = d.impact(inputs, references, seed).T.cpu()
    lines = [line(v, row, shown, k, generator(seed, f"explain {v}")) for v, row in enumerate(impact)]
    files.replace(path, "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in lines).encode())
    return path


class Contexts:
    """How samples are written down."""

    def __init__(self, inputs: Inputs, positions: int, names: Names | None, window: int) -> None:
        self.inputs, self.positions, self.window = inputs, positions, window
        example = first(inputs, 1)
        length = example[0].shape[1] if example[0].ndim == 2 else 0
        self.tokens = len(example) == 1 and not example[0].is_floating_point() and positions in (1, length)
        if names is not None and not self.tokens:
            raise ValueError("names say what tokens are called, but inputs are not tokens (examples, length)")
        self.call = names if callable(names) or names is None else names.__getitem__
        if self.call and isinstance(inputs, Tensor):  # refused before long work, where that can be known
            self._name(int(inputs.max()))

    def context(self, sample: int) -> dict[str, Any]:
        """A sample's example and position, and what is seen of it."""
        e, p = divmod(sample, self.positions)
        place = {"example": e, "position": p}
        example = tuple(tensor[0] for tensor in fetch(self.inputs, [e]))
        return place | (self._read(example[0], p) if self.tokens else {"values": values(example)})

    def _read(self, row: Int[Tensor, " length"], p: int) -> dict[str, Any]:
        stop = len(row) if self.positions == 1 else p + 1
        tokens = row[max(0, stop - self.window) : stop].tolist()
        return {"tokens": tokens} | ({"text": "".join(map(self._name, tokens))} if self.call else {})

    def _name(self, token: int) -> str:
        try:
            return str(self.call(token)) if self.call else ""
        except (IndexError, KeyError):
            raise ValueError(f"names has no string for token {token}; give one for every token of inputs") from None


def values(example: Examples) -> Any:
    """An example's numbers: a list, or a list of them where the model takes several tensors."""
    return example[0].tolist() if len(example) == 1 else [tensor.tolist() for tensor in example]


def line(v: int, impact: Tensor, shown: Contexts, k: int, noise: torch.Generator) -> dict[str, Any]:
    """What is written for one direction."""
    order = impact.argsort(descending=True, stable=True).tolist()
    n = len(order)
    middle = order[(n - k) // 2 :][:k]
    least = order[n - n // 4 :]

    def told(samples: Sequence[int]) -> list[dict[str, Any]]:
        return [shown.context(sample) | {"impact": float(impact[sample])} for sample in samples]

    test = intruder([shown.context(sample) for sample in order[:k]], least, shown, noise)
    return {"direction": v, "top": told(order[:k]), "middling": told(middle), "intruder": test}


def intruder(
    top: Sequence[dict[str, Any]], least: Sequence[int], shown: Contexts, noise: torch.Generator
) -> dict[str, Any] | None:
    """The top contexts and one drawn from the least, shuffled, and where it came to lie; None if all read alike."""
    seen = [content(one) for one in top]
    drawn = (shown.context(least[int(i)]) for i in torch.randperm(len(least), generator=noise))
    other = next((one for one in drawn if content(one) not in seen), None)
    if other is None:
        return None
    order = torch.randperm(len(top) + 1, generator=noise).tolist()
    everything = [*top, other]
    return {"contexts": [content(everything[i]) for i in order], "answer": order.index(len(top))}


def content(context: dict[str, Any]) -> dict[str, Any]:
    """What is seen of a context, without its place, which would give it away."""
    return {key: value for key, value in context.items() if key not in ("example", "position")}
