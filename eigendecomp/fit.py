"""Fitting: the state of a fit, and the loop that learns the directions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from eigendecomp.batches import ZERO, Batches
from eigendecomp.directions import Directions
from eigendecomp.factored.kept import coefficients
from eigendecomp.objective import Objective
from eigendecomp.settings import History, Settings
from eigendecomp.storage import Checkpoint
from eigendecomp.support import parallel
from eigendecomp.support.checks import whole
from eigendecomp.support.random import generator
from eigendecomp.target import Target

PATIENCE = 100  # steps without being kept after which a direction counts as dead
THRESHOLD_SAMPLES = 8192  # from which the inference threshold is read, at most


@dataclass
class Fit:
    """What a fit leaves behind."""

    encoder: Directions
    decoder: Directions
    threshold: float | None
    history: History


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
            moments = {
                name.removeprefix(prefix): value.to(weight.device)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            for value in (tensors[f"weight/{i}"], moments["exp_avg"], moments["exp_avg_sq"]):
                if value.shape != weight.shape:
                    raise ValueError(f"a factor's shape there is {tuple(value.shape)}, here {tuple(weight.shape)}")
            weight.data.copy_(tensors[f"weight/{i}"])
            self.optimizer.state[weight] = moments
        self.draw.set_state(tensors["draw"])
        prefix = "data/"
        data = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        self.batches.feed.restore(data)
        self.last_kept = tensors["last_kept"].to(self.last_kept.device)
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
) -> Fit:
    """Learn the directions. An interrupt (Ctrl-C) ends the fit early with what is learned so far.

    Raises:
        ValueError: if gradients are zero or not finite, or the checkpoint is of another fit.
    """
    state = State(target, settings, batches)
    if checkpoint is not None:
        checkpoint.read(state)
    objective, ever = Objective(settings.sparsity, coefficients), torch.zeros((), device=target.device)
    bar = tqdm(
        total=settings.steps,
        initial=state.step,
        disable=not (progress and parallel.leads()),
        desc="fit",
        mininterval=0.5,
    )
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
    return Fit(encoder, decoder, threshold(state, encoder, progress), state.history)


@torch.no_grad()
def threshold(state: State, encoder: Directions, progress: bool) -> float | None:
    """The inference threshold, from coefficients of fresh samples: at most half as many as the fit has seen."""
    batch = state.settings.batch_size
    samples = min(THRESHOLD_SAMPLES, max(1, state.step // 2) * batch)
    size = min(batch * math.ceil(256 / batch), batch * math.ceil(samples / batch))  # small batches would take too many
    passes = tqdm(
        range(math.ceil(samples / size)), disable=not (progress and parallel.leads()), desc="threshold", leave=False
    )
    return state.settings.sparsity.threshold(state.batches.batch(size, state.draw).inner(encoder) for _ in passes)


def rate(share: float) -> float:
    """The learning rate's schedule: constant, then to zero along a cosine over the last half."""
    return 1.0 if share < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * share - 1)))
