"""The capture of gradients into a store, shard by shard."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eigendecomp.factored.data import Data
from eigendecomp.factored.guard import Mistaken
from eigendecomp.factored.pieces import Recomputed
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.uses import UseSource
from eigendecomp.gradients import Gradients
from eigendecomp.reference import Draws
from eigendecomp.settings import Settings
from eigendecomp.share.file import pack_pool
from eigendecomp.storage import fingerprint
from eigendecomp.store.layout import Layout
from eigendecomp.store.shards import CONSTANT, FORMAT, Folder, digest, read_file
from eigendecomp.support import files
from eigendecomp.support.examples import Examples, Inputs, Named, alike, chunks, fetch
from eigendecomp.support.random import generator
from eigendecomp.target import Target

log = logging.getLogger(__name__)

CHUNK = 64  # examples captured at a time; no number depends on it but by rounding
TRIES = 3  # times that all is captured again, where what was captured before cannot be trusted


class Changed(Exception):
    """Gradients come in another form than those before them."""


def sources(target: Target, examples: Examples, settings: Settings) -> CapturedSource | UseSource:
    """Where gradients come from, as factors wherever they have some."""
    captured = CapturedSource(target, examples, form=False)
    return captured if settings.samples == "outputs" else UseSource(captured, examples, settings.scale == "unit")


@dataclass
class Collection:
    """All that is to be captured, and where it goes."""

    target: Target
    inputs: Inputs
    settings: Settings
    draws: int  # of references, for each sample
    file_bytes: int  # that a file takes, about
    data: Data
    source: CapturedSource | UseSource

    def into(self, folder: Folder, progress: bool) -> None:
        """Capture what the folder does not hold yet.

        Raises:
            ValueError: if the folder holds something else, the disk is too small, or a gradient is not finite.
        """
        for _ in range(TRIES):
            try:
                return self._attempt(folder, progress)
            except (Mistaken, Changed) as reason:
                told = "are of another form" if isinstance(reason, Changed) else "show that earlier ones were wrong"
                log.warning("gradients %s: all are captured again", told)
                folder.clear()
        raise ValueError(
            "the gradients of these inputs come in different forms; give examples of one shape, and a model that runs "
            "the same operations for all of them"
        )

    def _attempt(self, folder: Folder, progress: bool) -> None:
        tensors, metadata, each = self._manifest()
        folder.begin(tensors, metadata)
        layout, tied = Layout.from_plain(metadata["layout"]), digest(metadata["identity"])
        size, samples = metadata["examples"], metadata["samples"]
        held = read_file(folder.path, folder.manifest)[1]["shards"]
        if held is not None and all(folder.shard(number).exists() for number in range(held)):
            return
        total = self._announced(folder, size, samples, each, progress)
        number = -1
        with tqdm(total=total, desc="store", unit="sample", disable=not progress, mininterval=0.5) as bar:
            for number, examples in self._shards(folder, size):
                if examples is not None:
                    count = len(examples[0]) * samples
                    captured = self._captured(number, examples, layout)
                    files.write(folder.shard(number), captured, {"store": tied, "number": number, "samples": count})
                bar.update(samples * (size if examples is None else len(examples[0])))
        files.write(folder.manifest, tensors, {**metadata, "shards": number + 1})

    def _announced(self, folder: Folder, size: int, samples: int, each: float, progress: bool) -> int | None:
        """How many samples there will be, if that is known; says what they take, and looks whether there is room."""
        count, known = self.data.count, ""
        if count is not None:
            number = math.ceil(count / size)
            left = count - size * sum(folder.shard(k).exists() for k in range(number))
            folder.check_space(int(each * samples * max(0, left)))
            known = f", {count * samples} samples in {number} files, {each * samples * count / 1e6:.4g} MB"
        if progress:
            tqdm.write(f"{folder.path}: {each:.0f} bytes a sample, {self.draws} draw(s) of its reference{known}")
        return None if count is None else count * samples

    def _shards(self, folder: Folder, size: int) -> Iterator[tuple[int, Examples | None]]:
        """The examples of every shard by its number; none where it is written already."""
        if self.data.count is None:
            for number, examples in enumerate(chunks(self.inputs, size)):
                yield number, None if folder.shard(number).exists() else examples
            return
        for number in range(math.ceil(self.data.count / size)):
            some = range(number * size, min((number + 1) * size, self.data.count))
            yield number, None if folder.shard(number).exists() else fetch(self.inputs, some)

    def _captured(self, number: int, examples: Examples, layout: Layout) -> dict[str, Tensor]:
        """The tensors of a shard. Its references depend on its number alone, so it can be made without the others."""
        e, positions = len(examples[0]), self.data.outputs.shape[1]
        noise = generator(self.settings.seed, f"store {number}")
        draws = self.data.draws.again((e, positions), self.draws, noise)
        captured: dict[str, list[Tensor]] = {}
        for start in range(0, e, CHUNK):
            some = slice(start, start + CHUNK)
            piece = alike(examples, (tensor[some] for tensor in examples))
            for gradients in self._pieces(piece, draws[some]):
                own, tensors, _ = Layout.of(gradients)
                if own != layout:
                    raise Changed
                for key, tensor in tensors.items():
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise ValueError(
                            f"a gradient is NaN or infinite among the examples {start} to {start + CHUNK} of shard "
                            f"{number}; remove those examples, or smooth the model where it has no slope"
                        )
                    captured.setdefault(key, []).append(tensor.detach().cpu())
        return {key: torch.cat(parts) for key, parts in captured.items()}

    @torch.no_grad()
    def _pieces(self, examples: Examples, draws: Draws) -> Iterator[Gradients]:
        """The gradients of examples; one part after another where they are too large to be held at once."""
        gradients = self.source(examples, draws)
        for part in gradients.parts:
            if isinstance(part, Recomputed):
                yield from (piece() for piece in part.pieces)
                return
        yield gradients

    def _manifest(self) -> tuple[dict[str, Tensor], dict[str, Any], float]:
        """What the store is: told from the gradients of a few examples. And the bytes that a sample takes."""
        probe, positions = self.data.probe, self.data.outputs.shape[1]
        draws = self.data.draws.again((len(probe[0]), positions), self.draws, generator(self.settings.seed, "store"))
        gradients = next(self._pieces(probe, draws))
        layout, tensors, constants = Layout.of(gradients)
        each = sum(tensor.nbytes for tensor in tensors.values()) / len(gradients)
        samples = len(gradients) // len(probe[0])
        size = max(1, int(self.file_bytes / max(1.0, each * samples)))
        seen = {str(number): tensor for number, tensor in enumerate(self.data.seen)}
        identity = {
            "settings": self.settings.as_json(), "draws": self.draws, "target": fingerprint(self.target),
            "data": files.checksum(seen, f"{self.data.count} examples"), "examples in a file": size,
            "layout": files.checksum({}, str(layout.plain())),
        }  # fmt: skip
        names = list(self.data.seen.names) if isinstance(self.data.seen, Named) else None
        metadata = {
            "format": FORMAT, "identity": identity, "settings": self.settings.as_json(), "draws": self.draws,
            "samples": samples, "examples": size, "layout": layout.plain(), "shapes": self.target.shapes,
            "target": identity["target"], "arguments": names, "shards": None,
        }  # fmt: skip
        held = pack_pool(self.data.draws.pool, self.data.seen) | {CONSTANT + key: x for key, x in constants.items()}
        return held, metadata, each
