"""The same training step, with gradients got in several ways, and what each takes; and whole fits, in own processes."""

import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from eigendecomp.curvature import curvatures
from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence, KLDivergence
from eigendecomp.factored.data import Data
from eigendecomp.factored.kept import coefficients
from eigendecomp.factored.samples import OutputSamples
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.terms import Factored, Patches, Side, contract
from eigendecomp.fit import State, fit
from eigendecomp.gradients import Cotangents, Formed, FunctionalSource, Gradients, Source, at_own_position, sum_of
from eigendecomp.objective import Coefficients, loss_and_error
from eigendecomp.reference import Draws, OtherSample
from eigendecomp.settings import Settings
from eigendecomp.share.file import pack_pool
from eigendecomp.sparsity import BatchTopK
from eigendecomp.storage import identity
from eigendecomp.support import parallel
from eigendecomp.support.checkpoint import Checkpoint
from eigendecomp.support.random import generator
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target
from rooms.cost import sizes

LIMIT = 0.3  # seconds: what has taken longer in all is not timed again


class JacobianSource:
    """The Jacobian of the batch's losses: a backward pass through the whole batch for every sample, as published."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients:
        with torch.no_grad():
            c = at_own_position(cotangents(self.target.call(examples)))
        chosen = {name: p.detach() for name, p in self.target.chosen.items()}

        def losses(values: Mapping[str, Tensor]) -> Tensor:
            return (self.target.call(examples, dict(values)).unsqueeze(1) * c).sum((2, 3)).flatten()

        jacobian = torch.func.jacrev(losses, chunk_size=16)(chosen)
        return Gradients(self.target.shapes, [Formed(self.target.shapes, _rows(jacobian, c.shape[0] * c.shape[1]))])


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
            c = at_own_position(cotangents(self.target.call(examples)))
        copies, e = c.shape[1], len(c)
        f = self.model(*[tensor.repeat_interleave(copies, 0) for tensor in examples])
        f.backward(c.flatten(0, 1).view_as(f))
        named = {name.removeprefix("_module."): p for name, p in self.model.named_parameters()}
        gradients = {name: getattr(named[name], "grad_sample") for name in self.target.shapes}  # noqa: B009
        rows = _rows(gradients, e * copies)
        self.model.zero_grad()
        return Gradients(self.target.shapes, [Formed(self.target.shapes, rows)])


def _rows(by_name: Mapping[str, Tensor], n: int) -> Tensor:
    return torch.cat([value.detach().reshape(n, -1) for value in by_name.values()], 1)


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
        self.rule, self.dead = BatchTopK(0.1), torch.zeros(n_directions, dtype=torch.bool)

    def gradients(self) -> Gradients:
        return self.source(self.examples, self.draws)

    def __call__(self) -> float:
        batch = coefficients(self.rule, self.gradients(), self.encoder, self.decoder, 1.0)
        loss, _ = loss_and_error(self.rule, batch, self.dead)
        del batch  # as in a fit, nothing but the graph holds the gradients
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # nothing is left over for the next time, so that all its memory is seen
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


def uses(c: int, e: int, t: int, inputs: int, outputs: int) -> Factored:
    """The gradients of a weight used at t places of e examples, for c cotangents of each; random factors."""
    term = Side(torch.randn(1, e, t, inputs), inputs), Side(torch.randn(c, e, t, outputs), outputs)
    return Factored("w", (inputs, outputs), (0,), [term])


def objective_step(
    part: Factored, n_directions: int, kept: float, way: Callable[..., Coefficients]
) -> Callable[[], None]:
    """The objective on given gradients and its derivatives, with ``kept`` coefficients a sample of rank one."""
    d = Directions.random({"w": part.shape}, n_directions, 1).map(torch.nn.Parameter)
    e = d.map(lambda factor: torch.nn.Parameter(factor.detach().clone()))
    rule = BatchTopK(min(1.0, kept / n_directions), auxiliary=0.0)
    alive = torch.zeros(n_directions, dtype=torch.bool)

    def work() -> None:
        loss, _ = loss_and_error(rule, way(rule, Gradients({"w": part.shape}, [part]), e, d, 1.0), alive)
        torch.autograd.grad(loss, [*e.tensors(), *d.tensors()])

    return work


def convolution(examples: int, channels: int, places: int) -> dict[str, Factored]:
    """Gradients of a 3 × 3 kernel at places × places of images: with terms as kernels, and as unfolded patches."""
    images = torch.randn(examples, 1, channels, places + 2, places + 2)
    kernels = Patches(images, (3, 3), (1, 1), (1, 1), 9 * channels)
    outputs = Side(torch.randn(1, examples, places**2, channels), channels)
    ways = {"kernels": kernels, "patches": Side(kernels.values.contiguous(), kernels.size)}
    return {way: Factored("w", (channels, channels, 3, 3), (0,), [(outputs, side)]) for way, side in ways.items()}


def products(part: Factored, directions: Directions, formed: bool = False) -> Callable[[], None]:
    """Inner products with encoder and decoder, each forward and backward, and squared norms: of factors, or formed."""
    name, left, right = part.names[0], *directions.pair(part.names[0], part.left_axes)

    def work() -> None:
        some = Factored(name, part.shape, part.left_axes, part.terms)
        if formed:
            some.form()
        for _ in range(2):
            z = some.inner(directions) if formed else sum_of([contract(term, left, right) for term in some.terms])
            torch.autograd.grad(z.sum(), list(directions.tensors()), retain_graph=True)
        some.square_norms()

    return work


def guard_seconds(step: Step, repeats: int) -> dict[str, float]:
    """What a training step takes, and what comparing its gradients with autograd's takes."""
    source, pieces = step.source, [(step.examples, step.draws)]
    assert isinstance(source, CapturedSource)
    gradients = source.gradients(*pieces[0])
    return seconds({"step": step, "look": lambda: source.guard.wrong(pieces, gradients.weighted)}, repeats)


@torch.no_grad()
def activation_one_by_one(d: Decomposition, examples: Sequence[Tensor]) -> Tensor:
    """What :meth:`Decomposition.activation` gives, one direction after another through the whole model."""
    each = (d.decoder.select([v]) for v in range(d.decoder.n))
    return torch.cat([curvatures(d.target, d.settings.divergence, one, examples) for one in each], 1).sqrt()


def plain_pass(target: Target, examples: Sequence[Tensor]) -> Callable[[], None]:
    """The limit: a forward and a backward pass of the batch, every example repeated once for each of its samples."""
    positions = target.outputs(tuple(tensor[:1] for tensor in examples)).shape[1]
    repeated = [tensor.repeat_interleave(positions, 0) for tensor in examples]

    def run() -> None:
        f = target.call(repeated)
        torch.autograd.grad(f.square().sum(), list(target.chosen.values()))

    return run


def seconds(
    work: Mapping[str, Callable[[], object]], repeats: int = 5, limit: float = LIMIT, idle: int = 1
) -> dict[str, float]:
    """Median CPU seconds of each piece of work; each in turn in every round, so that all meet the same machine.

    The first ``idle`` times count for nothing. What has taken more than ``limit`` seconds in all is not repeated.
    """
    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(repeats + idle):
        for name, call in work.items():
            if number > idle and sum(taken[name]) > limit:
                continue
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values[idle:]) for name, values in taken.items()}


def costs(
    work: Mapping[str, Callable[[], object]], repeats: int = 5, limit: float = LIMIT
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and peak memory of each piece of work; memory is that of the first time, which has no part in seconds."""
    memory = {name: peak_memory(call) for name, call in work.items()}
    return seconds(work, repeats, limit, idle=0), memory


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ says on standard error about GPUs and memory it has not seen."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes of all tensors made during the work and alive at once, at most; what was there before does not count.

    Told by the profiler from every allocation, so it is the same on every machine. A process takes more: the
    interpreter and torch (0.3 GB), the model and the data, and what the allocator keeps.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()  # type: ignore[attr-defined]
        most = max(most, alive)
    return most


class Windows(torch.utils.data.Dataset[Tensor]):
    """Windows of random tokens, each made when it is asked for: a dataset of any length in no memory."""

    def __init__(self, examples: int, vocabulary: int, length: int = 16) -> None:
        self.examples, self.vocabulary, self.length = examples, vocabulary, length

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, number: int) -> Tensor:
        return torch.randint(self.vocabulary, (self.length,), generator=torch.Generator().manual_seed(number))


def fit_alone(
    vocabulary: int,
    width: int,
    layers: int,
    directions: int,
    batch_sizes: Sequence[int],
    steps: int,
    *,
    examples: int = 1000,
    processes: int = 1,
) -> dict[str, Any]:
    """Fits of all parameters of a transformer on 16 positions, in as many new processes, one thread each.

    Returns parameters, the median of wall seconds a step for each batch size, and the first process's peak memory in
    bytes as the system counts it: the interpreter, torch, the model, the directions with Adam's moments, and the steps.
    """
    return _alone("fits", [vocabulary, width, layers, directions, list(batch_sizes), steps, examples], processes)


def _alone(what: str, given: Sequence[Any], processes: int = 1) -> dict[str, Any]:
    """What one of ``WORK`` returns, in as many new processes of one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-W", "ignore", *(launcher if processes > 1 else []), "-m", __name__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    notebooks = Path(__file__).resolve().parents[2]  # where this module is found by its name
    done = subprocess.run(
        [*command, what, json.dumps(given)], env=environment, cwd=notebooks, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the work in a process of its own failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def together(*works: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What several processes of their own return that run at the same time: for memory, not for seconds."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda work: work(), works))


def pool_alone(vocabulary: int, windows: int, at_once: bool) -> dict[str, Any]:
    """The pool of references of a language model on windows of 16 positions, in a process of its own.

    Returns the process's peak memory in bytes once the model has run, and when the pool is there; the bytes that a file
    takes for it; and the norms of its rows. ``at_once`` holds the outputs of all windows, as was done before.
    """
    return _alone("pool", [vocabulary, windows, at_once])


def _pool(vocabulary: int, windows: int, at_once: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    target = Target(sizes.Transformer(vocabulary, 64, 4, 2, 16).eval(), ["attention.0.k.weight"])
    tokens, settings = torch.randint(vocabulary, (windows, 16)), fit_settings(1, 1, 1)
    target.outputs(tokens[:3])
    start, divergence = process_peak(), settings.divergence
    if at_once:
        predictions = divergence.predict(target.outputs(tokens).flatten(0, 1))
        pool = settings.reference.prepare(divergence, predictions, generator(0, "pool"))
    else:
        pool = settings.pool(Outputs.of(target, (tokens,)))
    file = sum(tensor.nbytes for tensor in pack_pool(pool, () if at_once else (tokens,)).values())
    return {"before": start, "process_memory": process_peak(), "file": file, "norms": pool.norm(dim=1).tolist()}


def _fits(
    vocabulary: int, width: int, layers: int, directions: int, batch_sizes: Sequence[int], steps: int, examples: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    model, data_set = sizes.Transformer(vocabulary, width, 8, layers, 16).eval(), Windows(examples, vocabulary)
    target, each = Target(model), []
    for batch_size in batch_sizes:
        ended: list[float] = []
        settings = fit_settings(directions, steps + 2, batch_size)
        data = Data.read(target, data_set, settings, pool_samples=256)  # what is done once is made small
        batches = OutputSamples(target, data.probe, settings).batches(data, generator(0, "data"))
        stamp = lambda _, ended=ended: ended.append(time.perf_counter())  # noqa: E731
        fit(target, batches, settings, progress=False, threshold_samples=1, on_step=stamp)
        each.append(statistics.median(b - a for a, b in pairwise(ended)))  # the first step counts for nothing
    return {"parameters": target.size, "step_seconds": each, "process_memory": process_peak()}


def fit_settings(n_directions: int, steps: int, batch_size: int) -> Settings:
    """Settings of a fit of all parameters at rank one, else those of :func:`eigendecomp.decompose`."""
    return Settings(
        KLDivergence(), OtherSample(), ("*",), n_directions, 1, "cp", False, BatchTopK(0.1), steps, batch_size, 1e-2, 0
    )


def process_peak() -> int:
    """Bytes of memory that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss starts from what the process that launched this one has held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def checkpoint_writes(model: nn.Module, examples: Sequence[Tensor], n_directions: int) -> dict[str, float]:
    """Bytes of a fit's checkpoint, seconds a write takes, and the share of a long run's time that writing it is."""
    target, settings = Target(model), fit_settings(n_directions, 2, 16)
    data = Data.read(target, tuple(examples), settings)
    batches = OutputSamples(target, data.probe, settings).batches(data, generator(0, "data"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fit"
        checkpoint = Checkpoint(path, identity(target, settings, data.seen, data.count), seconds=30.0)

        def write(state: State) -> None:
            for _ in range(3):
                checkpoint.write(state)

        fit(target, batches, settings, progress=False, threshold_samples=1, on_step=write)
        share = checkpoint.taken / checkpoint.interval()
        return {"bytes": path.stat().st_size, "write_seconds": checkpoint.taken, "share_of_time": share}


WORK: dict[str, Callable[..., dict[str, Any]]] = {"fits": _fits, "pool": _pool}

if __name__ == "__main__":
    measured = WORK[sys.argv[1]](*json.loads(sys.argv[2]))
    if parallel.leads():
        print(json.dumps(measured))
