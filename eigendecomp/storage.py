"""What a checkpoint and a store must be one of."""

from typing import Any

from eigendecomp.settings import Settings
from eigendecomp.support import files, parallel
from eigendecomp.support.examples import Examples
from eigendecomp.target import Target


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
