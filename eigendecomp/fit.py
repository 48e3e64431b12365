"""Fitting: the state of a fit, and the loop that learns the directions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from eigendecomp.batches import ZERO, Batches
from eigendecomp.directions import Directions
from eigendecomp.objective import Objective, error_change
from eigendecomp.settings import History, Settings
from eigendecomp.storage import Checkpoint
from eigendecomp.support import parallel
from eigendecomp.support.checks import whole
from eigendecomp.support.random import generator
from eigendecomp.target import Target

PATIENCE = 100  # steps without being kept after which a direction counts as dead
THRESHOLD_SAMPLES = 8192  # from which the inference threshold is read
JUDGED_SAMPLES = 4096  # of the training data, on which directions and restarts are judged


@dataclass
class Fit:
    """What a fit leaves behind."""

    encoder: Directions
    decoder: Directions
    threshold: float | None
    history: History
    whole: bool = True  # not ended early by an interrupt


class State:
    """Everything that the next step of a fit depends on."""

    def __init__(self, target: Target, settings: Settings, batches: Batches) -> None:
        self.settings, self.batches = settings, batches
        shapes, n, rank = target.shapes, settings.n_directions, settings.rank
        self.decoder = Directions.random(
            shapes,
            n,
            rank,
            settings.factorization,
            generator=generator(settings.seed, "directions"),
            dtype=target.dtype,
            device=target.device,
        ).map(torch.nn.Parameter)
        self.encoder = self.decoder
        if not settings.tied:
            self.encoder = self.decoder.map(lambda factor: torch.nn.Parameter(factor.detach().clone()))
        self.weights = [*self.decoder.tensors(), *([] if settings.tied else self.encoder.tensors())]
        self.optimizer = torch.optim.Adam(self.weights, lr=settings.learning_rate, fused=True)
        self.draw = generator(settings.seed, "references")
        self.last_kept = torch.zeros(n, dtype=torch.long, device=target.device)
        self.history = History()
        self.step = 0

    def dead(self) -> Bool[Tensor, " v"]:
        """Directions that no sample has used for a while."""
        return self.step - self.last_kept > PATIENCE

    def update(self, loss: Tensor, *others: Tensor) -> Callable[[], list[Tensor]]:
        """Start one step of the optimiser; what is returned ends it, back on unit norm.

        It gives the sums of ``others`` over processes. Until it is called, these sums are under way, and whatever does
        not need the directions can go on.
        """
        self.optimizer.zero_grad()
        loss.backward()
        sums = parallel.sums(*(weight.grad for weight in self.weights), *others)

        def end() -> list[Tensor]:
            found = sums()
            for weight, grad in zip(self.weights, found, strict=False):
                weight.grad = grad
            self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * rate(self.step / self.settings.steps)
            self.optimizer.step()
            self.decoder.normalize_()
            return found[len(self.weights) :]

        return end

    def tensors(self) -> dict[str, Tensor]:
        kept = {f"weight/{i}": weight for i, weight in enumerate(self.weights)}
        for i, weight in enumerate(self.weights):
            kept |= {f"adam/{i}/{key}": value for key, value in self.optimizer.state[weight].items()}
        return (
            kept
            | {"draw": self.draw.get_state(), "last_kept": self.last_kept}
            | {f"data/{key}": value for key, value in self.batches.feed.state().items()}
        )

    def numbers(self) -> dict[str, Any]:
        return {"step": self.step, "history": asdict(self.history)}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        whole("step", numbers["step"], 0, self.settings.steps)
        for i, weight in enumerate(self.weights):
            prefix = f"adam/{i}/"
            moments = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for value in (tensors[f"weight/{i}"], moments["exp_avg"], moments["exp_avg_sq"]):
                if value.shape != weight.shape:
                    raise ValueError(f"a factor's shape there is {tuple(value.shape)}, here {tuple(weight.shape)}")
            weight.data.copy_(tensors[f"weight/{i}"])
            self.optimizer.state[weight] = moments
        self.draw.set_state(tensors["draw"])
        prefix = "data/"
        data = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        self.batches.feed.restore(data)
        self.last_kept = tensors["last_kept"]
        self.step, self.history = numbers["step"], History.read(numbers["history"])


@torch.enable_grad()
def fit(
    target: Target,
    batches: Batches,
    settings: Settings,
    *,
    progress: bool = True,
    log_every: int = 50,
    checkpoint: Checkpoint | None = None,
    name: str = "fit",
) -> Fit:
    """Learn the directions. An interrupt (Ctrl-C) ends the fit early with what is learned so far.

    Raises:
        ValueError: if gradients are zero or not finite, or the checkpoint is of another fit.
    """
    state = State(target, settings, batches)
    if checkpoint is not None:
        checkpoint.read(state)
    objective, ever = Objective(settings.sparsity), torch.zeros((), device=target.device)
    hidden = not (progress and parallel.leads())
    bar = tqdm(total=settings.steps, initial=state.step, disable=hidden, desc=name, mininterval=0.5)
    gradients = None
    try:
        while state.step < settings.steps:
            if gradients is None:
                gradients = batches.batch(settings.batch_size, state.draw)
            loss, error, s = objective(
                gradients, state.encoder, state.decoder, state.dead(), state.step / settings.steps
            )
            last = state.step == settings.steps - 1
            log = state.step % log_every == 0 or last
            if log and not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss is {loss.item()} at step {state.step}: the gradients are infinite or NaN, or "
                    f"learning_rate={settings.learning_rate} is too high"
                )
            write = checkpoint is not None and parallel.leads() and (checkpoint.due() or last)
            samples = len(s) * parallel.processes()
            update = state.update(loss, loss, error, (s.detach() != 0).sum(0).to(error.dtype))
            del gradients, loss, error, s  # what a batch takes is free again before the next one is there
            # The next gradients need no direction, so they need not wait for the other processes; but what a checkpoint
            # keeps must not be a batch ahead.
            gradients = None if write or last else batches.batch(settings.batch_size, state.draw)
            loss, error, kept = update()
            ever += kept.sum()
            if log and (state.step > 0 or settings.steps == 1) and not (ever or any(state.history.kept)):
                raise ValueError(f"all gradients are zero in the first {state.step + 1} steps: {ZERO}")
            state.last_kept[kept > 0] = state.step
            if log:
                dead = state.dead().double().mean().item()
                each = kept.sum().item() / samples
                state.history.add(state.step, loss.item(), error.item(), each, dead)
                bar.set_postfix(error=f"{error.item():.3f}", dead=f"{dead:.2f}", refresh=False)
            state.step += 1
            bar.update()
            if checkpoint is not None and write:
                checkpoint.write(state)
    except KeyboardInterrupt:
        bar.write(f"interrupted: returning the directions of step {state.step}")
    bar.close()

    decoder = state.decoder.map(lambda factor: factor.detach())
    encoder = decoder if settings.tied else state.encoder.map(lambda factor: factor.detach())
    with torch.no_grad():
        size, count = reading(settings, THRESHOLD_SAMPLES)
        z = torch.cat([batches.batch(size, state.draw).inner(encoder) for _ in range(count)])
    return Fit(encoder, decoder, settings.sparsity.threshold(z), state.history, state.step == settings.steps)


def reading(settings: Settings, samples: int) -> tuple[int, int]:
    """The size and the number of the batches in which at least so many samples are read."""
    size = settings.batch_size * math.ceil(256 / settings.batch_size)  # small batches would take too many
    return size, math.ceil(samples / size)


def best_fit(
    target: Target, batches: Batches, settings: Settings, *, progress: bool = True, checkpoint: Checkpoint | None = None
) -> Fit:
    """Of ``settings.restarts`` fits, each pruned, the one with the lowest training error.

    All see the data in the same order; they differ in where they start and in the references that are drawn. The first
    is the fit of ``settings.seed`` itself. An interrupt ends the fit under way, and the rest are not begun.
    """
    begin, found = batches.feed.state(), []
    for number in range(settings.restarts):
        own, keeper, name = settings, checkpoint, "fit"
        if number:
            own = replace(settings, seed=generator(settings.seed, f"restart {number}").initial_seed() % 2**31)
            name = f"fit {number + 1} of {settings.restarts}"
            batches.feed.restore(begin)
        if number and checkpoint is not None:
            path = checkpoint.path.with_name(f"{checkpoint.path.stem}.{number + 1}{checkpoint.path.suffix}")
            keeper = replace(checkpoint, path=path, identity=checkpoint.identity | {"restart": number + 1})
        found.append(fit(target, batches, own, progress=progress, checkpoint=keeper, name=name))
        if not found[-1].whole:
            break
    if settings.prune is None and settings.restarts == 1:
        return found[0]
    judged = []
    for one in found:
        batches.feed.restore(begin)
        judged.append(pruned(one, batches, settings))
    errors = [error for _, error in judged]
    best = judged[errors.index(min(errors))][0]
    best.history.restarts = errors
    return best


@torch.no_grad()
def pruned(found: Fit, batches: Batches, settings: Settings) -> tuple[Fit, float]:
    """The fit without the directions that do not earn their place, and its error on training samples.

    E(S) = Σ‖g − ĝ‖² / Σ‖g‖² is the error with the directions S alone, which share as many coefficients as all had. The
    direction v that costs least while the others' coefficients stay is left out if E(S∖v) − E(S) < ``prune``; then the
    next, until one is worth more.
    """
    draw, (size, count) = generator(settings.seed, "judged"), reading(settings, JUDGED_SAMPLES)
    rows = [(g.inner(found.encoder), g.inner(found.decoder), g.square_norms().sum())
            for g in (batches.batch(size, draw) for _ in range(count))]  # fmt: skip
    z, y, total = torch.cat([z for z, _, _ in rows]), torch.cat([y for _, y, _ in rows]), sum(n for *_, n in rows)
    gram = found.decoder.gram()

    def judge(live: Tensor) -> tuple[Float[Tensor, " v"], float]:
        s = settings.sparsity.keep_batch(z * live, 1.0)
        cost = (s * (2 * (y - s @ gram) + s)).sum(0)  # ‖e + s u‖² − ‖e‖² with e = g − ĝ and unit u
        cost, change, whole = parallel.sums(cost, error_change(s, y, gram), total)()
        return cost, (1 + change / whole).item()

    cost, error = judge(live := torch.ones_like(z[0]))
    if settings.prune is not None:
        live = (cost != 0).to(z.dtype)  # those that are never used cost nothing
    while settings.prune is not None and live.sum() > 1:
        rest = live.index_fill(0, cost.masked_fill(live == 0, math.inf).argmin(), 0)
        next_cost, left = judge(rest)
        if left - error >= settings.prune:
            break
        live, cost, error = rest, next_cost, left
    keep = live.nonzero()[:, 0]
    decoder = found.decoder.select(keep)
    encoder = decoder if settings.tied else found.encoder.select(keep)
    threshold = settings.sparsity.threshold(z * live) if len(keep) < len(live) else found.threshold
    found.history.pruned = (live == 0).nonzero()[:, 0].tolist()
    return Fit(encoder, decoder, threshold, found.history, found.whole), error


def rate(share: float) -> float:
    """The learning rate's schedule: constant, then to zero along a cosine over the last half."""
    return 1.0 if share < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * share - 1)))
