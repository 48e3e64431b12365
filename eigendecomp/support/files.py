"""Files of tensors with JSON metadata: written whole or not at all, checked when read, never run.

safetensors holds the tensors; the metadata and a sha256 over both go into its header, so that a file cut short or
altered by one bit is recognised.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

KEY = "eigendecomp"


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write atomically: a temporary file beside ``path``, flushed to disk, then renamed over it.

    Raises:
        ValueError: if the folder does not exist.
        OSError: if the disk is full or not writable; what was at ``path`` is then still there.
    """
    path = writable(path)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata, sort_keys=True)
    replace(path, save(held, {KEY: text, "sha256": checksum(held, text)}))


def replace(path: Path, content: bytes) -> None:
    """Write bytes whole or not at all; a link stays one, and what it leads to is written."""
    path = writable(path).resolve()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own mode lets no one else read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk too
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def writable(path: str | Path) -> Path:
    """The path, if a file can be written there; ValueError otherwise."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise ValueError(f"{path!r} is not the path of a file")
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist; make it first")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the path of a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is a device or a pipe; give the path of a regular file")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{str(path)!r} is a link into a folder that does not exist; make it first")
    return path


def folder(path: str | Path) -> Path:
    """The path, if there is a folder or one can be made there; ValueError otherwise."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise ValueError(f"{path!r} is not the path of a folder")
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; give the path of a folder")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist; make it first")
    return path


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata that :func:`write` wrote.

    Raises:
        ValueError: if there is no such file, it is not ours, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    content = path.read_bytes()
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])["__metadata__"]
        text, expected = header[KEY], header["sha256"]
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise TypeError("its metadata is not an object")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a file of eigendecomp, or it is damaged ({error})") from None
    if checksum(tensors, text) != expected:
        raise ValueError(f"{str(path)!r} is damaged: its sha256 is not the one written with it; restore or delete it")
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """sha256 over the names, shapes and bytes of tensors, and a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
