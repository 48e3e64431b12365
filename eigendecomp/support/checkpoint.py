"""A long computation's state, written as it goes on and read back."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eigendecomp.support import files, parallel

WRITE_SHARE = 1 / 40  # of a long fit's time goes into its checkpoints, at most


class Kept(Protocol):
    """A state that a file can hold."""

    def tensors(self) -> dict[str, Tensor]: ...

    def numbers(self) -> dict[str, Any]: ...

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None: ...


@dataclass
class Checkpoint:
    """Where a fit is kept as it goes on, and what it must be a fit of."""

    path: Path
    identity: dict[str, Any]  # settings, target and data, as plain values
    seconds: float  # between two writes, at least
    written: float = field(default_factory=time.monotonic)
    taken: float = 0.0

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.interval()

    def interval(self) -> float:
        """Seconds between two writes: as chosen, or longer where writing would take more than its share of the time."""
        return max(self.seconds, self.taken / WRITE_SHARE)

    def set_aside(self) -> Path | None:
        """Keep what was written under another name, to which nothing is written any more."""
        aside = self.path.with_name(self.path.name + ".before")
        return self.path.replace(aside) if self.path.exists() and parallel.leads() else None

    def write(self, state: Kept) -> None:
        start = time.monotonic()
        files.write(self.path, state.tensors(), {"identity": self.identity, **state.numbers()})
        self.written = time.monotonic()
        self.taken = self.written - start

    def resume(self, state: Kept) -> None:
        """Put what is kept, if anything is, into ``state``.

        Raises:
            ValueError: if the file is damaged, or of another fit; the difference is spelled out.
        """
        if not self.path.exists():
            return
        tensors, numbers = files.read(self.path)
        if told := differences(numbers.get("identity"), self.identity):
            raise ValueError(
                f"checkpoint {str(self.path)!r} is of another fit ({told}); delete it or choose another path"
            )
        try:
            state.restore(tensors, numbers)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r} does not hold a fit's state ({error}); delete it or choose another path"
            ) from None


def differences(theirs: object, ours: Mapping[str, Any]) -> str:
    """Where two nested mappings of plain values differ, in words; empty where they do not."""
    a, b = flatten(theirs if isinstance(theirs, Mapping) else {}), flatten(ours)
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return "; ".join(f"{key}: {a.get(key)!r} there, {b.get(key)!r} here" for key in keys)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def optimizer_tensors(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weights and what the optimiser holds of each, by names."""
    named = {f"weight/{i}": weight for i, weight in enumerate(weights)}
    for i, weight in enumerate(weights):
        named |= {f"adam/{i}/{key}": value for key, value in optimizer.state[weight].items()}
    return named


def restore_optimizer(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Put what :func:`optimizer_tensors` named back; ValueError if a shape is another."""
    for i, weight in enumerate(weights):
        moments = {key: value.to(weight.device) for key, value in under(f"adam/{i}/", tensors).items()}
        for value in (tensors[f"weight/{i}"], moments["exp_avg"], moments["exp_avg_sq"]):
            if value.shape != weight.shape:
                raise ValueError(f"a factor's shape there is {tuple(value.shape)}, here {tuple(weight.shape)}")
        weight.data.copy_(tensors[f"weight/{i}"])
        optimizer.state[weight] = moments


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
