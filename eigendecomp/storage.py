"""What a decomposition is, and the file that holds it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.directions import Directions, factor_sizes
from eigendecomp.settings import History, Settings, settings_from
from eigendecomp.support import files, parallel
from eigendecomp.support.checks import real
from eigendecomp.support.examples import Examples, Named
from eigendecomp.target import Target

FORMAT = 1
LARGE_POOL = 4 << 20  # bytes; a smaller pool is written itself, so that no inputs are in the file


class Stored:
    """All that a decomposition holds.

    Args:
        encoder: directions that read coefficients; the decoder itself where they are tied.
        decoder: directions that rebuild gradients.
        threshold: the |z| from which a coefficient is kept; None keeps all.
        pool: predictions of which references are made.
        seen: the examples that the pool was made from, if they are known.
    """

    def __init__(
        self,
        target: Target,
        settings: Settings,
        encoder: Directions,
        decoder: Directions,
        threshold: float | None,
        pool: Float[Tensor, "m k"],
        history: History,
        seen: Examples = (),
    ) -> None:
        self.target, self.settings, self.history = target, settings, history
        self.encoder, self.decoder, self.threshold = encoder, decoder, threshold
        self.pool, self.seen = pool, seen

    def save(self, path: str | Path) -> None:
        """Write the directions as safetensors with the settings as metadata.

        A pool of references above 4 MiB is written as the inputs it came from, if these are smaller: mind who reads it.
        """
        inputs = {f"pool of/{number}": tensor for number, tensor in enumerate(self.seen)}
        smaller = 0 < sum(tensor.nbytes for tensor in self.seen) < self.pool.nbytes
        tensors = inputs if smaller and self.pool.nbytes > LARGE_POOL else {"pool": self.pool}
        for name, directions in (("decoder", self.decoder), ("encoder", self.encoder)):
            if name == "decoder" or not self.settings.tied:
                tensors |= pack(name, directions)
        metadata = {
            "format": FORMAT,
            "settings": self.settings.as_json(),
            "shapes": self.decoder.shapes,
            "target": fingerprint(self.target),
            "threshold": self.threshold,
            "history": asdict(self.history),
            "arguments": list(self.seen.names) if isinstance(self.seen, Named) else None,
        }
        files.write(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Self:
        """Read what :meth:`save` wrote; nothing in the file is ever run.

        Raises:
            ValueError: if the file is not a decomposition, is damaged, or is one of another model.
        """
        tensors, metadata = files.read(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is not a decomposition that this version reads (format {FORMAT})")
        try:
            settings = settings_from(metadata["settings"])
            target = Target(model, settings.parameters, settings.group)
            check_target(target, metadata, path)
            history = History.read(metadata["history"])
            n = settings.n_directions - len(history.pruned)
            decoder = unpack("decoder", tensors, target, settings, n)
            encoder = decoder if settings.tied else unpack("encoder", tensors, target, settings, n)
            if metadata["threshold"] is not None:
                real("threshold", metadata["threshold"], least=0)
            inputs = sum(name.startswith("pool of/") for name in tensors)
            seen: Examples = tuple(tensors[f"pool of/{number}"] for number in range(inputs))
            if seen and metadata.get("arguments") is not None:
                seen = Named.of(seen, metadata["arguments"])
            pool = settings.pool(target.outputs(seen)) if seen else tensors["pool"].to(target.device)
            return cls(target, settings, encoder, decoder, metadata["threshold"], pool, history, seen)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} holds other metadata than a decomposition's ({error!r})") from None


def pack(prefix: str, directions: Directions) -> dict[str, Tensor]:
    """The factors under names that say what they are."""
    return {
        f"{prefix}/{name}/{number}": factor
        for name, factors in directions.factors.items()
        for number, factor in enumerate(factors)
    }


def unpack(prefix: str, tensors: Mapping[str, Tensor], target: Target, settings: Settings, n: int) -> Directions:
    """The n directions that :func:`pack` took apart; ValueError if a factor has another shape than theirs."""
    factors: dict[str, list[Tensor]] = {}
    for name, shape in target.shapes.items():
        sizes = factor_sizes(shape, settings.rank, settings.factorization)
        factors[name] = [tensors[f"{prefix}/{name}/{number}"].to(target.device) for number in range(len(sizes))]
        for factor, size in zip(factors[name], sizes, strict=True):
            if factor.shape != (n, *size):
                raise ValueError(
                    f"the factors of {name!r} have shape {tuple(factor.shape)}, which fits no direction of it"
                )
    return Directions(target.shapes, settings.factorization, factors)


def fingerprint(target: Target) -> str:
    """sha256 over the names, shapes and values of the chosen parameters."""
    return files.checksum(target.chosen, "target")


def identity(target: Target, settings: Settings, seen: Examples, count: int | None) -> dict[str, Any]:
    """What a checkpoint must be a checkpoint of: the settings, the target, and ``seen`` of ``count`` examples."""
    return {
        "settings": settings.as_json(),
        "target": fingerprint(target),
        "precision": str(parallel.precision() or target.dtype),
        "data": files.checksum({str(i): tensor for i, tensor in enumerate(seen)}, f"{count} examples"),
    }


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
