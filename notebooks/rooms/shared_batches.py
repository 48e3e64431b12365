"""Fits of several sizes on the same batches, whose gradients are captured once."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from eigendecomp.batches import Batches
from eigendecomp.decomposition import Decomposition
from eigendecomp.factored.data import Data
from eigendecomp.factored.samples import SAMPLES
from eigendecomp.fit import fit
from eigendecomp.gradients import Gradients
from eigendecomp.settings import Settings
from eigendecomp.support.examples import Feed, Inputs
from eigendecomp.support.random import generator
from eigendecomp.target import Target


@dataclass
class Kept:
    """Batches that are captured for the first fit and held for the others, which would draw the same ones."""

    batches: Batches
    made: list[Gradients] = field(default_factory=list)
    place: int = 0

    @property
    def feed(self) -> Feed:
        return self.batches.feed

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        if self.place == len(self.made):
            self.made.append(self.batches.batch(size, generator))
        self.place += 1
        return self.made[self.place - 1]


def fits(model: nn.Module, inputs: Inputs, settings: Settings, sizes: Sequence[int]) -> dict[int, Decomposition]:
    """What :func:`eigendecomp.decompose` gives with so many directions and else the same settings, by size."""
    target = Target(model, settings.parameters, settings.group)
    data = Data.read(target, inputs, settings)
    samples = SAMPLES[settings.samples](target, data.probe, settings)
    batches, found = Kept(samples.batches(data, generator(settings.seed, "data"))), {}
    for n in sizes:
        batches.place, own = 0, replace(settings, n_directions=n)
        u = fit(target, batches, own, progress=False)
        found[n] = Decomposition(
            target, own, u.encoder, u.decoder, u.threshold, data.draws.pool, u.history, data.seen, samples
        )
    return found
