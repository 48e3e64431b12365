"""What is written and read back: a fit as it goes on, and the parts of a decomposition's file."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from eigendecomp.directions import Directions
from eigendecomp.settings import History, Settings
from eigendecomp.support import files, parallel
from eigendecomp.support.examples import Examples, Named
from eigendecomp.target import Target

LARGE_POOL = 4 << 20  # bytes; a smaller pool is written itself, so that no inputs are in the file
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

    def read(self, state: Kept) -> None:
        """Put what is kept, if anything is, into ``state``.

        Raises:
            ValueError: if the file is damaged, or of another fit; the difference is spelled out.
        """
        if not self.path.exists():
            return
        tensors, numbers = files.read(self.path)
        identity = numbers.get("identity")
        theirs, ours = flatten(identity if isinstance(identity, dict) else {}), flatten(self.identity)
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if differing:
            told = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing)
            raise ValueError(
                f"checkpoint {str(self.path)!r} is of another fit ({told}); delete it or choose another path"
            )
        try:
            state.restore(tensors, numbers)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r} does not hold a fit's state ({error}); delete it or choose another path"
            ) from None


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def fingerprint(target: Target) -> str:
    """sha256 over the names, shapes and values of the chosen parameters."""
    return files.checksum(target.chosen, "target")


def pack(prefix: str, directions: Directions) -> dict[str, Tensor]:
    """The factors under names that say what they are."""
    return {
        f"{prefix}/{name}/{number}": factor
        for name, factors in directions.factors.items()
        for number, factor in enumerate(factors)
    }


def pack_pool(pool: Tensor, seen: Examples) -> dict[str, Tensor]:
    """The pool of references; where it is large, the examples that it is made from again, if these are smaller."""
    inputs = {f"pool of/{number}": tensor for number, tensor in enumerate(seen)}
    size = sum(tensor.nbytes for tensor in seen)
    return inputs if 0 < size < pool.nbytes and pool.nbytes > LARGE_POOL else {"pool": pool}


def unpack_seen(tensors: Mapping[str, Tensor], arguments: Sequence[str] | None) -> Examples:
    """The examples that the pool is made from; none where the pool itself was written."""
    seen = tuple(tensors[f"pool of/{number}"] for number in range(sum(name.startswith("pool of/") for name in tensors)))
    return seen if arguments is None or not seen else Named.of(seen, arguments)


def unpack(
    prefix: str, tensors: Mapping[str, Tensor], target: Target, settings: Settings, history: History
) -> Directions:
    """The directions that :func:`pack` took apart."""
    like = Directions.random(target.shapes, 1, settings.rank, settings.factorization)
    factors = {
        name: [tensors[f"{prefix}/{name}/{number}"].to(target.device) for number in range(len(expected))]
        for name, expected in like.factors.items()
    }
    for name, expected in like.factors.items():
        for factor, one in zip(factors[name], expected, strict=True):
            if factor.shape != (settings.n_directions - len(history.pruned), *one.shape[1:]):
                raise ValueError(
                    f"the factors of {name!r} have shape {tuple(factor.shape)}, which fits no direction of it"
                )
    return Directions(target.shapes, settings.factorization, factors)


def check_target(target: Target, metadata: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a file made from another model, saying what differs."""
    theirs = {name: tuple(shape) for name, shape in metadata["shapes"].items()}
    if theirs != target.shapes:
        names = sorted(set(theirs.items()) ^ set(target.shapes.items()))
        raise ValueError(f"{str(path)!r} decomposes another model: they differ in {names[0][0]!r} {names[0][1]}")
    if metadata["target"] != fingerprint(target):
        raise ValueError(
            f"{str(path)!r} was made for other weights of the same shapes; load the model that was decomposed"
        )
