"""The door: a store of gradients, and fits that draw from it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigendecomp.batches import HeldBatches
from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Factorization, check_rank
from eigendecomp.divergence import Divergence, SquaredError
from eigendecomp.factored.data import Data
from eigendecomp.fit import fit
from eigendecomp.gradients import Gradients
from eigendecomp.reference import Mean, OtherSample, Reference
from eigendecomp.settings import Settings
from eigendecomp.share.file import check_target, settings_from, unpack_seen
from eigendecomp.sparsity import BatchTopK, Sparsity
from eigendecomp.storage import fingerprint
from eigendecomp.store.collect import Collection, sources
from eigendecomp.store.layout import Layout
from eigendecomp.store.shards import CONSTANT, FORMAT, Folder, Shards, read_file
from eigendecomp.support import files, parallel
from eigendecomp.support.checkpoint import Checkpoint
from eigendecomp.support.checks import real, whole
from eigendecomp.support.examples import Examples, Inputs
from eigendecomp.support.random import generator
from eigendecomp.support.rows import Outputs
from eigendecomp.support.show import Shown
from eigendecomp.target import Target, patterns


class GradientStore(Shown):
    """The gradients of samples, captured once and kept on disk; made by :meth:`collect` or :meth:`open`."""

    def __init__(
        self, target: Target, settings: Settings, draws: int, pool: Float[Tensor, "m k"], seen: Examples,
        identity: Mapping[str, Any], shards: Shards,
    ) -> None:  # fmt: skip
        self.target, self.settings, self.draws = target, settings, draws
        self.pool, self.seen, self.identity, self.shards = pool, seen, identity, shards

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        inputs: Inputs,
        *,
        path: str | Path,
        divergence: Divergence | None = None,
        reference: Reference | None = None,
        parameters: Sequence[str] = ("*",),
        samples: Literal["outputs", "uses"] = "outputs",
        scale: Literal["unit"] | None = None,
        group: Mapping[str, str] | None = None,
        draws: int = 1,
        seed: int = 0,
        file_bytes: int = 1 << 26,
        progress: bool = True,
    ) -> Self:
        """Capture the gradient of every sample of the inputs, with ``draws`` references each, into a folder.

        The arguments are those of :func:`eigendecomp.decompose` that decide gradients; the others are given to
        :meth:`decompose`, for each fit anew. How many bytes a sample takes is printed before it starts. If it is
        interrupted, the same call goes on where it was; if all is there, it only opens the store.

        Fits from a store see these samples and these draws again and again, so they overfit where there are few: with a
        weight of a story model the held-out error was that of a live fit from some 16,000 samples on.

        Args:
            path: a new or empty folder, or one in which the same store was begun.
            draws: references of every sample; one where the reference is fixed.
            seed: draws the references and their pool.
            file_bytes: what one file takes, about; the references of its samples are drawn together.

        Raises:
            ValueError: for anything that cannot be handled; if the folder holds something else, or a file of it is
                damaged; or in several processes or under mixed precision.
        """
        settings = Settings(
            SquaredError() if divergence is None else divergence,
            (Mean() if samples == "uses" else OtherSample()) if reference is None else reference,
            patterns(parameters), 1, 1, "cp", False, BatchTopK(0.1), 1, 1, 1e-2, seed, samples, scale, group=group,
        )  # fmt: skip
        check(settings, draws)
        whole("file_bytes", file_bytes)
        folder, target = Folder(path), Target(model, settings.parameters, settings.group)
        data = Data.read(target, inputs, settings)
        source = sources(target, data.probe, settings)
        Collection(target, inputs, settings, draws, file_bytes, data, source).into(folder, progress)
        return cls.open(path, model, progress=progress)

    @classmethod
    def open(cls, path: str | Path, model: nn.Module, *, progress: bool = True) -> Self:
        """A store that was collected before; every file of it is checked.

        Raises:
            ValueError: if it is not one, is not complete, is damaged, or is one of another model.
        """
        folder = Folder(path)
        if not folder.manifest.is_file():
            raise ValueError(f"{str(path)!r} is not a store of gradients; make one with GradientStore.collect")
        tensors, metadata = read_file(folder.path, folder.manifest)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is not a store that this version reads (format {FORMAT})")
        settings = settings_from(metadata["settings"])
        target = Target(model, settings.parameters, settings.group)
        check_target(target, metadata, path)
        if metadata["shards"] is None:
            raise ValueError(f"{str(path)!r} is not complete: call GradientStore.collect again, which goes on with it")
        seen = unpack_seen(tensors, metadata["arguments"])
        pool = settings.pool(Outputs.of(target, seen)) if seen else tensors["pool"].to(target.device)
        constants = {key.removeprefix(CONSTANT): x for key, x in tensors.items() if key.startswith(CONSTANT)}
        shards = Shards.open(
            folder, metadata["shards"], metadata["identity"], Layout.from_plain(metadata["layout"]), target.shapes,
            constants, target.device, progress and parallel.leads(),
        )  # fmt: skip
        return cls(target, settings, metadata["draws"], pool, seen, metadata["identity"], shards)

    def __len__(self) -> int:
        """The number of gradients: samples × draws."""
        return len(self.shards)

    def summary(self) -> list[tuple[str, str]]:
        """What is held, and what it takes."""
        s, size = self.settings, self.shards.bytes
        each = f"{size / len(self):.0f} bytes each, {size / 1e6:.4g} MB in {len(self.shards.tensors)} files"
        return [
            ("gradients", f"{len(self)}, with {self.draws} draw(s) of each sample's reference; {each}"),
            ("parameters", ", ".join(f"{name} {shape}" for name, shape in self.target.shapes.items())),
            ("of", f"{s.divergence}, {s.reference}, samples={s.samples!r}"),
        ]

    def gradients(self, numbers: Int[Tensor, " n"] | Sequence[int]) -> Gradients:
        """Gradients by their numbers: example by example, position by position, draw by draw, as they were captured.

        Raises:
            IndexError: for a number that there is not.
        """
        index = torch.as_tensor(numbers, dtype=torch.long)
        if len(index) == 0 or index.min() < 0 or index.max() >= len(self):
            raise IndexError(f"the store holds the gradients 0 to {len(self) - 1}; give one or more of them")
        return self.shards.gradients(index)

    def decompose(
        self,
        *,
        n_directions: int = 5,
        rank: int = 1,
        factorization: Factorization = "cp",
        tied: bool = False,
        sparsity: Sparsity | None = None,
        steps: int = 2000,
        batch_size: int = 256,
        learning_rate: float = 1e-2,
        seed: int = 0,
        prune: float | None = None,
        restarts: int = 1,
        start: Literal["random", "samples"] = "random",
        progress: bool = True,
        checkpoint: str | Path | None = None,
        checkpoint_seconds: float = 30.0,
    ) -> Decomposition:
        """Learn directions from the stored gradients, as :func:`eigendecomp.decompose` does from those of the model.

        A batch is ``batch_size`` gradients drawn from all alike, not whole examples. The model is not run.

        Raises:
            ValueError: for anything that cannot be handled, or if the model's weights are others by now.
        """
        settings = replace(
            self.settings, n_directions=n_directions, rank=rank, factorization=factorization, tied=tied,
            sparsity=BatchTopK(0.1) if sparsity is None else sparsity, steps=steps, batch_size=batch_size,
            learning_rate=learning_rate, seed=seed, prune=prune, restarts=restarts, start=start,
        )  # fmt: skip
        path = None if checkpoint is None else files.writable(checkpoint)
        real("checkpoint_seconds", checkpoint_seconds, least=0)
        check_rank(self.target.shapes, rank, factorization)
        if fingerprint(self.target) != self.identity["target"]:
            raise ValueError(
                "the model's weights are not those whose gradients are stored; load these, or collect anew"
            )
        told = {"settings": settings.as_json(), "store": dict(self.identity)}
        keeper = None if path is None else Checkpoint(path, told, checkpoint_seconds)
        batches = HeldBatches(len(self), lambda index, _: self.shards.gradients(index), generator(seed, "data"))
        fitted = fit(self.target, batches, settings, progress=progress, checkpoint=keeper)
        # A saved file makes a large pool again from inputs and the fit's seed; the store's pool is of the store's seed.
        seen = self.seen if seed == self.settings.seed else ()
        return Decomposition(
            self.target, settings, fitted.encoder, fitted.decoder, fitted.threshold, self.pool, fitted.history, seen
        )


def check(settings: Settings, draws: int) -> None:
    """Refuse what a store cannot hold."""
    whole("draws", draws)
    if settings.reference.fixed and draws > 1:
        raise ValueError(f"draws={draws}, and {settings.reference} gives a sample the same gradient every time")
    if parallel.processes() > 1 or parallel.precision():
        raise ValueError(
            "a store is collected by one process, in the precision of the target's parameters; fits from it may then "
            "run in several"
        )
