"""The same training step, with gradients got in several ways, and what each takes."""

import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from eigendecomp.capture import CapturedSource
from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence, KLDivergence
from eigendecomp.fit import Objective, generator
from eigendecomp.gradients import Cotangents, Formed, FunctionalSource, Gradients, Source, spread
from eigendecomp.reference import Draws, OtherSample
from eigendecomp.sparsity import BatchTopK
from eigendecomp.target import Target


class JacobianSource:
    """One backward pass through the whole batch for every sample, as published code does it: O(samples²)."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients:
        with torch.no_grad():
            c = spread(cotangents(self.target.call(examples)))
        chosen = {name: p.detach() for name, p in self.target.chosen.items()}
        copies, e = c.shape[1], len(c)
        repeated = [tensor.repeat_interleave(copies, 0) for tensor in examples]

        def losses(values: Mapping[str, Tensor]) -> Tensor:
            return (self.target.call(repeated, dict(values)) * c.flatten(0, 1)).sum((1, 2))

        found = torch.func.jacrev(losses, chunk_size=16)(chosen)
        return Gradients(self.target.shapes, [Formed(self.target.shapes, _rows(found, e * copies))])


class OpacusSource:
    """opacus's GradSampleModule: hooks with closed forms for known layers, every gradient formed."""

    def __init__(self, target: Target) -> None:
        from opacus import GradSampleModule

        self.target = target
        model = copy.deepcopy(target.model)
        for name, p in model.named_parameters():
            p.requires_grad_(name in target.chosen)
        # opacus looks at modules in training mode alone; these targets behave the same in both.
        self.model = GradSampleModule(model.train(), loss_reduction="sum")

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients:
        with torch.no_grad():
            c = spread(cotangents(self.target.call(examples)))
        copies, e = c.shape[1], len(c)
        f = self.model(*[tensor.repeat_interleave(copies, 0) for tensor in examples])
        f.backward(c.flatten(0, 1).view_as(f))
        named = {name.removeprefix("_module."): p for name, p in self.model.named_parameters()}
        found = {name: getattr(named[name], "grad_sample") for name in self.target.shapes}  # noqa: B009
        rows = _rows(found, e * copies)
        self.model.zero_grad()
        return Gradients(self.target.shapes, [Formed(self.target.shapes, rows)])


def _rows(found: Mapping[str, Tensor], n: int) -> Tensor:
    return torch.cat([value.detach().reshape(n, -1) for value in found.values()], 1)


class Step:
    """One training step on one batch, taken again and again."""

    def __init__(
        self,
        source: Source,
        examples: Sequence[Tensor],
        n_directions: int,
        rank: int,
        divergence: Divergence | None = None,
    ) -> None:
        divergence = divergence or KLDivergence()
        target, self.source, self.examples = source.target, source, examples
        f, reference = target.outputs(tuple(examples)), OtherSample(256)
        pool = reference.prepare(divergence, divergence.predict(f.flatten(0, 1)), generator(0, "pool"))
        self.draws = Draws.of(reference, divergence, pool, (f.shape[0], f.shape[1]), 1, generator(0, "draws"))
        made = Directions.random(target.shapes, n_directions, rank, generator=generator(0, "directions"))
        self.decoder = made.map(torch.nn.Parameter)
        self.encoder = made.map(lambda factor: torch.nn.Parameter(factor.clone()))
        weights = [*self.decoder.tensors(), *self.encoder.tensors()]
        self.optimizer = torch.optim.Adam(weights, lr=1e-3, fused=True)
        self.objective, self.dead = Objective(BatchTopK(0.1)), torch.zeros(n_directions, dtype=torch.bool)

    def gradients(self) -> Gradients:
        return self.source(self.examples, self.draws)

    def __call__(self) -> float:
        loss, _, _ = self.objective(self.gradients(), self.encoder, self.decoder, self.dead)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.decoder.normalize_()
        return loss.item()


def sources(
    model: nn.Module, examples: Sequence[Tensor], parameters: Sequence[str], terms: int
) -> dict[str, Callable[[], Source]]:
    """The four ways, made when called."""
    target = Target(model.eval(), parameters)
    return {
        "factored": partial(CapturedSource, target, examples, terms=terms),
        "vmap": partial(FunctionalSource, target),
        "jacobian": partial(JacobianSource, target),
        "opacus": partial(OpacusSource, target),
    }


def plain_pass(target: Target, examples: Sequence[Tensor]) -> Callable[[], None]:
    """The limit: a forward and a backward pass of the batch, every example repeated once for each of its samples."""
    positions = target.outputs(tuple(tensor[:1] for tensor in examples)).shape[1]
    repeated = [tensor.repeat_interleave(positions, 0) for tensor in examples]

    def run() -> None:
        f = target.call(repeated)
        torch.autograd.grad(f.square().sum(), list(target.chosen.values()))

    return run


def seconds(work: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median CPU seconds of each piece of work; each in turn in every round, so that all meet the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(repeats):
        for name, call in work.items():
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_memory(work: Callable[[], object]) -> float:
    """Bytes by which the process grows at most while the work is done.

    Linux alone: the allocator gives back what it holds, the kernel's mark is set back, and read after the work.
    """
    work()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    work()
    return float(max(_status("VmHWM") - before, 0))


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key + ":"))
