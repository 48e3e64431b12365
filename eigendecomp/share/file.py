"""The file of a decomposition: its directions, settings and references; safetensors with JSON metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp import divergence as divergences
from eigendecomp import reference as references
from eigendecomp import sparsity as sparsities
from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence
from eigendecomp.reference import Reference
from eigendecomp.settings import Settings
from eigendecomp.sparsity import Sparsity
from eigendecomp.storage import fingerprint
from eigendecomp.support import files
from eigendecomp.support.axes import factor_sizes
from eigendecomp.support.checks import real
from eigendecomp.support.examples import Examples, Named
from eigendecomp.support.history import History
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target

FORMAT = 1
LARGE_POOL = 4 << 20  # bytes; a smaller pool is written itself, so that no inputs are in the file


def save(d: Decomposition, path: str | Path) -> None:
    """:meth:`Decomposition.save`."""
    tensors = pack_pool(d.pool, d.seen)
    for name, directions in (("decoder", d.decoder), ("encoder", d.encoder)):
        if name == "decoder" or not d.settings.tied:
            tensors |= pack(name, directions)
    metadata = {
        "format": FORMAT,
        "settings": d.settings.as_json(),
        "shapes": d.decoder.shapes,
        "target": fingerprint(d.target),
        "threshold": d.threshold,
        "history": asdict(d.history),
        "arguments": list(d.seen.names) if isinstance(d.seen, Named) else None,
    }
    files.write(path, tensors, metadata)


def load(cls: type[Decomposition], path: str | Path, model: nn.Module) -> Decomposition:
    """:meth:`Decomposition.load`."""
    tensors, metadata = files.read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a decomposition that this version reads (format {FORMAT})")
    try:
        settings = settings_from(metadata["settings"])
        target = Target(model, settings.parameters, settings.group)
        check_target(target, metadata, path)
        history = History.from_plain(metadata["history"])
        n = settings.n_directions - len(history.pruned)
        decoder = unpack("decoder", tensors, target, settings, n)
        encoder = decoder if settings.tied else unpack("encoder", tensors, target, settings, n)
        if metadata["threshold"] is not None:
            real("threshold", metadata["threshold"], least=0)
        seen = unpack_seen(tensors, metadata.get("arguments"))
        pool = settings.pool(Outputs.of(target, seen)) if seen else tensors["pool"].to(target.device)
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


def pack_pool(pool: Float[Tensor, "m k"], seen: Examples) -> dict[str, Tensor]:
    """The pool of references; where it is large, the examples that it is made from again, if these are smaller."""
    smaller = 0 < sum(tensor.nbytes for tensor in seen) < pool.nbytes
    if smaller and pool.nbytes > LARGE_POOL:
        return {f"pool of/{number}": tensor for number, tensor in enumerate(seen)}
    return {"pool": pool}


def unpack_seen(tensors: Mapping[str, Tensor], arguments: Sequence[str] | None) -> Examples:
    """The examples that the pool is made from; none where the pool itself was written."""
    seen = tuple(tensors[f"pool of/{number}"] for number in range(sum(name.startswith("pool of/") for name in tensors)))
    return seen if arguments is None or not seen else Named.of(seen, arguments)


def settings_from(plain: Mapping[str, Any]) -> Settings:
    """The settings that :meth:`Settings.as_json` described; only classes of this package can be named."""

    def make(module: Any, kind: type, value: Mapping[str, Any]) -> Any:
        fields = dict(value)
        named = getattr(module, str(fields.pop("name")), None)
        if not (isinstance(named, type) and issubclass(named, kind)):
            raise ValueError(f"unknown {kind.__name__.lower()} {value['name']!r}")
        return named(**fields)

    modules = {Divergence: divergences, Reference: references, Sparsity: sparsities}
    rules = {k.__name__.lower(): make(module, k, plain[k.__name__.lower()]) for k, module in modules.items()}
    return Settings(**{**plain, **rules, "parameters": tuple(plain["parameters"])})


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
