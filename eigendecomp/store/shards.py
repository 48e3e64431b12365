"""A folder of gradients: files of so many samples each, written whole or not at all, and read where they are needed.

The manifest says what the gradients are and how they are written. A shard can be made without the others, so what is
missing is captured again and nothing else. Tensors are mapped from the files, not read into memory.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from eigendecomp.directions import Shapes
from eigendecomp.gradients import Gradients
from eigendecomp.store.layout import Layout
from eigendecomp.support import files
from eigendecomp.support.checkpoint import differences

FORMAT = 1
MANIFEST = "store.safetensors"
CONSTANT = "constant/"  # before the names of tensors that all samples share


class Folder:
    """Where a store is kept.

    Args:
        path: a folder that is there, or will be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = files.folder(path)
        self.manifest = self.path / MANIFEST

    def shard(self, number: int) -> Path:
        return self.path / f"{number:05d}.safetensors"

    def begin(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Make the folder for a store, or find the same store in it.

        Raises:
            ValueError: if it holds anything else.
        """
        if self.manifest.exists():
            if told := differences(read_file(self.path, self.manifest)[1]["identity"], metadata["identity"]):
                raise ValueError(
                    f"{str(self.path)!r} is a store of other gradients ({told}); delete it or choose another path"
                )
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"{str(self.path)!r} is a folder of something else; give one that is empty, or a new one")
        self.path.mkdir(exist_ok=True)
        files.write(self.manifest, tensors, metadata)

    def clear(self) -> None:
        """Remove all that was captured."""
        for path in self.path.glob("[0-9]*.safetensors"):
            path.unlink()
        self.manifest.unlink(missing_ok=True)

    def check_space(self, needed: int) -> None:
        """ValueError if the disk has not so many bytes left."""
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise ValueError(
                f"the store takes {needed / 1e9:.2f} GB and the disk of {str(self.path)!r} has {free / 1e9:.2f} left; "
                "give fewer inputs, fewer parameters or another path"
            )


def read_file(folder: Path, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One file of a store; ValueError, with what to do, if it is missing, damaged or not of it."""
    try:
        return files.read(path)
    except ValueError as error:
        remedy = "delete that file" if path.name != MANIFEST else f"delete the folder {str(folder)!r}"
        raise ValueError(
            f"{error}: {remedy} and call GradientStore.collect again, which captures what is missing and nothing else"
        ) from None


def digest(identity: Mapping[str, Any]) -> str:
    """What ties a shard to its store."""
    return files.checksum({}, json.dumps(identity, sort_keys=True))


@dataclass
class Shards:
    """The gradients of all samples, wherever they lie; in the order in which they were captured."""

    layout: Layout
    shapes: Shapes
    constants: dict[str, Tensor]
    tensors: list[dict[str, Tensor]]
    ends: Int[Tensor, " shards"]  # samples up to and with each
    device: torch.device

    @classmethod
    def open(
        cls, folder: Folder, count: int, identity: Mapping[str, Any], layout: Layout, shapes: Shapes,
        constants: dict[str, Tensor], device: torch.device, progress: bool,
    ) -> Self:  # fmt: skip
        """Check every file and map its tensors.

        Raises:
            ValueError: if a shard is missing, damaged or of another store.
        """
        tied, tensors, counts = digest(identity), [], []
        for number in tqdm(range(count), desc="store", leave=False, disable=not progress, mininterval=0.5):
            path = folder.shard(number)
            metadata = read_file(folder.path, path)[1]
            if metadata.get("store") != tied or metadata.get("number") != number:
                raise ValueError(
                    f"{str(path)!r} is a shard of another store: delete that file and call GradientStore.collect "
                    "again, which captures what is missing and nothing else"
                )
            with safe_open(path, "pt") as file:
                tensors.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            counts.append(metadata["samples"])
        constants = {key: value.to(device) for key, value in constants.items()}
        return cls(layout, shapes, constants, tensors, torch.tensor(counts).cumsum(0), device)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def bytes(self) -> int:
        """What the files take, without their headers."""
        return sum(tensor.nbytes for shard in self.tensors for tensor in shard.values())

    def gradients(self, numbers: Int[Tensor, " n"]) -> Gradients:
        """The gradients of chosen samples, in the order that is asked for."""
        shard = torch.bucketize(numbers, self.ends, right=True)
        order = shard.argsort(stable=True)
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        local, back = (numbers - starts[shard])[order], order.argsort()
        shards, counts = shard[order].unique_consecutive(return_counts=True)
        pieces = list(zip(shards.tolist(), local.split(counts.tolist()), strict=True))
        tensors = {}
        for key, each in self.layout.each().items():
            parts = [self.tensors[place][key][some // each] for place, some in pieces]
            tensors[key] = (parts[0] if len(parts) == 1 else torch.cat(parts)[back]).to(self.device)
        return self.layout.gradients(self.shapes, tensors, self.constants)
