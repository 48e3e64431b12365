"""Fitting: the state of a fit, and the loop that learns the directions."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from eigendecomp.batches import ZERO, Batches
from eigendecomp.directions import Directions
from eigendecomp.factored.kept import coefficients
from eigendecomp.gradients import Gradients, Products
from eigendecomp.objective import Coefficients, loss_and_error, squared_error
from eigendecomp.settings import Settings
from eigendecomp.start import at_samples
from eigendecomp.support import parallel
from eigendecomp.support.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer, under
from eigendecomp.support.checks import whole
from eigendecomp.support.history import History
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
    """Everything that the next step of a fit depends on.

    Restarts are fitted at once, on the same gradients: theirs is one set of directions, in as many blocks of
    ``n_directions``, and one optimiser, which treats every number apart.
    """

    def __init__(self, target: Target, settings: Settings, batches: Batches, *, hidden: bool = True) -> None:
        self.settings, self.batches = settings, batches
        n = settings.n_directions
        self.blocks = [slice(i * n, (i + 1) * n) for i in range(settings.restarts)]
        roles = [f"directions {i}" if i else "directions" for i in range(settings.restarts)]
        self.draw = generator(settings.seed, "references")
        if settings.start == "samples":
            starts = [at_samples(target, settings, batches, self.draw, role, hidden=hidden) for role in roles]
        else:
            starts = [settings.random(target, role) for role in roles]
        self.decoder = self.encoder = reduce(Directions.beside, starts).map(torch.nn.Parameter)
        if not settings.tied:
            self.encoder = self.decoder.map(lambda factor: torch.nn.Parameter(factor.detach().clone()))
        self.weights = [*self.decoder.tensors(), *([] if settings.tied else self.encoder.tensors())]
        self.optimizer = torch.optim.Adam(self.weights, lr=settings.learning_rate, fused=True)
        self.last_kept = torch.zeros(self.decoder.n, dtype=torch.long, device=target.device)
        self.ever = torch.zeros((), device=target.device)  # coefficients kept so far
        self.histories = [History() for _ in self.blocks]
        self.step = 0
        self.following: Gradients | None = None  # the next batch, where it is drawn ahead

    def dead(self) -> Bool[Tensor, " v"]:
        """Directions that no sample has used for a while."""
        return self.step - self.last_kept > PATIENCE

    def objectives(self, gradients: Gradients) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, "n v"]]:
        """Loss and error of every restart, and the sparse coefficients of all."""
        done, dead, rule = self.step / self.settings.steps, self.dead(), self.settings.sparsity
        if len(self.blocks) == 1:
            batches = [coefficients(rule, gradients, self.encoder, self.decoder, done)]
        else:
            z, y, gram, squares = gradients.products(self.encoder, self.decoder)
            own = [self.decoder.map(lambda factor, b=b: factor[b]) for b in self.blocks]
            each = [Products(z[:, b], y[:, b], gram[b, b], squares) for b in self.blocks]
            batches = [Coefficients(p, rule.keep_batch(p.z, done), u) for p, u in zip(each, own, strict=True)]
        pairs = [loss_and_error(rule, batch, dead[b]) for b, batch in zip(self.blocks, batches, strict=True)]
        losses, errors = map(torch.stack, zip(*pairs))
        return losses, errors, torch.cat([batch.kept.detach() for batch in batches], 1)

    def log(self, losses: Tensor, errors: Tensor, kept: Tensor, samples: int) -> None:
        """Add this step to every restart's history."""
        dead, n = self.dead().double().view(len(self.blocks), -1).mean(1), self.settings.n_directions
        each = kept.view(-1, n).sum(1) / samples
        for history, *values in zip(self.histories, losses, errors, each, dead, strict=True):
            history.add(self.step, *(value.item() for value in values))

    def update(self, loss: Tensor, *others: Tensor) -> Callable[[], list[Tensor]]:
        """Backpropagate and start the all-reduce of the gradients and of ``others``.

        Call what is returned to apply the step and renormalise; it gives the sums of ``others`` over processes.
        """
        for weight in self.weights:
            weight.grad = None
        loss.backward()
        sums = parallel.sums(*(weight.grad for weight in self.weights), *others)

        def end() -> list[Tensor]:
            summed = sums()
            for weight, grad in zip(self.weights, summed, strict=False):
                weight.grad = grad
            self.optimizer.param_groups[0]["lr"] = self.settings.learning_rate * rate(self.step / self.settings.steps)
            self.optimizer.step()
            self.decoder.normalize_()
            return summed[len(self.weights) :]

        return end

    def tensors(self) -> dict[str, Tensor]:
        place = {f"data/{key}": value for key, value in self.batches.feed.state().items()}
        own = {"draw": self.draw.get_state(), "last_kept": self.last_kept}
        return {**optimizer_tensors(self.optimizer, self.weights), **own, **place}

    def numbers(self) -> dict[str, Any]:
        return {"step": self.step, "histories": [asdict(history) for history in self.histories]}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        whole("step", numbers["step"], 0, self.settings.steps)
        restore_optimizer(self.optimizer, self.weights, tensors)
        self.draw.set_state(tensors["draw"])
        self.batches.feed.restore(under("data/", tensors))
        self.last_kept = tensors["last_kept"].to(self.last_kept.device)
        self.step, self.histories = numbers["step"], [History.from_plain(history) for history in numbers["histories"]]


@torch.enable_grad()
def fit(
    target: Target,
    batches: Batches,
    settings: Settings,
    *,
    progress: bool = True,
    log_every: int = 50,
    checkpoint: Checkpoint | None = None,
    threshold_samples: int = THRESHOLD_SAMPLES,
    on_step: Callable[[State], None] = lambda _: None,
) -> Fit:
    """Learn the directions: of all restarts, pruned, those with the lowest training error.

    An interrupt (Ctrl-C) ends the fit early with what is learned so far. ``on_step`` is called after every step.

    Raises:
        ValueError: if gradients are zero or not finite, or the checkpoint is of another fit.
    """
    hidden = not (progress and parallel.leads())
    state = State(target, settings, batches, hidden=hidden)
    if checkpoint is not None:
        checkpoint.resume(state)
    bar = tqdm(total=settings.steps, initial=state.step, disable=hidden, desc="fit", mininterval=0.5)
    try:
        while state.step < settings.steps:
            last = state.step == settings.steps - 1
            write = checkpoint is not None and parallel.leads() and (checkpoint.due() or last)
            # What a checkpoint keeps must not be a batch ahead.
            step(state, ahead=not (write or last), log=state.step % log_every == 0 or last)
            state.step += 1
            bar.set_postfix(error=f"{min(h.error[-1] for h in state.histories):.3f}", refresh=False)
            bar.update()
            if checkpoint is not None and write:
                checkpoint.write(state)
            on_step(state)
    except KeyboardInterrupt:
        bar.write(f"interrupted: returning the directions of step {state.step}")
    bar.close()
    with torch.no_grad():
        return chosen(state, fresh(state, threshold_samples, progress))


def step(state: State, *, ahead: bool, log: bool) -> None:
    """One step on the batch that was drawn ahead, or else on a new one; may draw the next one ahead."""
    settings, batches = state.settings, state.batches
    gradients, state.following = state.following or batches.batch(settings.batch_size, state.draw), None
    loss, error, s = state.objectives(gradients)
    if log and not loss.isfinite().all():
        raise ValueError(
            f"the loss is {loss.sum().item()} at step {state.step}: the gradients are infinite or NaN, or "
            f"learning_rate={settings.learning_rate} is too high"
        )
    samples = len(s) * parallel.processes()
    update = state.update(loss.sum(), loss, error, (s.detach() != 0).sum(0).to(error.dtype))
    del gradients, loss, error, s  # what a batch takes is free again before the next one is there
    # The next gradients need no direction, so they need not wait for the other processes.
    state.following = batches.batch(settings.batch_size, state.draw) if ahead else None
    loss, error, kept = update()
    state.ever += kept.sum()
    if log and (state.step > 0 or settings.steps == 1) and not state.ever and not any(state.histories[0].kept):
        raise ValueError(f"all gradients are zero in the first {state.step + 1} steps: {ZERO}")
    state.last_kept.masked_fill_(kept > 0, state.step)
    if log:
        state.log(loss, error, kept, samples)


def chosen(state: State, fresh: Iterable[Gradients]) -> Fit:
    """What a state comes to, judged on fresh samples: the best restart's directions that earn their place."""
    settings = state.settings
    decoder = state.decoder.map(Tensor.detach)
    encoder = decoder if settings.tied else state.encoder.map(Tensor.detach)
    if settings.prune is None and settings.restarts == 1:
        return Fit(
            encoder, decoder, settings.sparsity.threshold(map(lambda g: g.inner(encoder), fresh)), state.histories[0]
        )
    # A map, unlike a generator with a name for it, holds no batch while the next one is made.
    zs, ys, squares = zip(*map(lambda g: (g.inner(encoder), g.inner(decoder), g.square_norms().sum()), fresh))
    z, y, total = torch.cat(zs), torch.cat(ys), torch.stack(squares).sum()
    grams = [decoder.map(lambda factor, b=b: factor[b]).gram() for b in state.blocks]
    judged = [earning(z[:, b], y[:, b], gram, total, settings) for b, gram in zip(state.blocks, grams)]
    errors = [error for _, error in judged]
    best = errors.index(min(errors))
    live, block, history = judged[best][0], state.blocks[best], state.histories[best]
    history.restarts, history.pruned = errors, (live == 0).nonzero()[:, 0].tolist()
    keep = block.start + live.nonzero()[:, 0]
    decoder = decoder.select(keep)
    encoder = decoder if settings.tied else encoder.select(keep)
    return Fit(encoder, decoder, settings.sparsity.threshold([z[:, block] * live]), history)


def fresh(state: State, most: int, progress: bool) -> Iterator[Gradients]:
    """Fresh samples to judge directions by: at most half as many as the fit has seen."""
    batch = state.settings.batch_size
    samples = min(most, max(1, state.step // 2) * batch)
    size = min(batch * math.ceil(256 / batch), batch * math.ceil(samples / batch))  # small batches would take too many
    hidden = not (progress and parallel.leads())
    for _ in tqdm(range(math.ceil(samples / size)), disable=hidden, desc="threshold", leave=False):
        yield state.batches.batch(size, state.draw)


def earning(
    z: Float[Tensor, "n v"], y: Float[Tensor, "n v"], gram: Float[Tensor, "v v"], total: Tensor, settings: Settings
) -> tuple[Float[Tensor, " v"], float]:
    """One for the directions that earn their place and zero for the others; the training error with the former.

    E(S) = Σ‖g − ĝ‖² / Σ‖g‖² is the error with the directions S alone, which share as many coefficients as all had. The
    direction v that costs least while the others' coefficients stay is left out if E(S∖v) − E(S) < ``prune``; then the
    next, until one is worth more.
    """

    def judge(live: Tensor) -> tuple[Tensor, float]:
        s = settings.sparsity.keep_batch(z * live, 1.0)
        cost = (s * (2 * (y - s @ gram) + s)).sum(0)  # ‖e + s u‖² − ‖e‖² with e = g − ĝ and unit u
        cost, left, squares = parallel.sums(cost, squared_error(total, s, y, gram), total)()
        return cost, (left / squares).item()

    live = torch.ones_like(z[0])
    cost, error = judge(live)
    if settings.prune is not None:
        live = (cost != 0).to(z.dtype)  # those that are never used cost nothing
    while settings.prune is not None and live.sum() > 1:
        rest = live.index_fill(0, cost.masked_fill(live == 0, math.inf).argmin(), 0)
        next_cost, left = judge(rest)
        if left - error >= settings.prune:
            break
        live, cost, error = rest, next_cost, left
    return live, error


def rate(share: float) -> float:
    """The learning rate's schedule: constant, then to zero along a cosine over the last half."""
    return 1.0 if share < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * share - 1)))
