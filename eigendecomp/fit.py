"""Fitting: the state of a fit, and the loop that learns the directions."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from eigendecomp.batches import ZERO, Batches
from eigendecomp.directions import Directions
from eigendecomp.factored.kept import coefficients
from eigendecomp.gradients import Gradients, Products
from eigendecomp.objective import Everything, Objective, squared_error
from eigendecomp.settings import History, Settings
from eigendecomp.sparsity import Sparsity
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
    """Everything that the next step of a fit depends on.

    Restarts are fitted at once, on the same gradients: theirs is one set of directions, in as many blocks of
    ``n_directions``, and one optimiser, which treats every number apart.
    """

    def __init__(self, target: Target, settings: Settings, batches: Batches) -> None:
        self.settings, self.batches, self.objective = settings, batches, Objective(settings.sparsity, coefficients)
        n, like = settings.n_directions, {"dtype": target.dtype, "device": target.device}
        self.blocks = [slice(i * n, (i + 1) * n) for i in range(settings.restarts)]
        starts = [generator(settings.seed, f"directions {i}" if i else "directions") for i in range(len(self.blocks))]
        self.decoder = reduce(Directions.beside, (
            Directions.random(target.shapes, n, settings.rank, settings.factorization, generator=start, **like)
            for start in starts
        )).map(torch.nn.Parameter)  # fmt: skip
        self.encoder = self.decoder
        if not settings.tied:
            self.encoder = self.decoder.map(lambda factor: torch.nn.Parameter(factor.detach().clone()))
        self.weights = [*self.decoder.tensors(), *([] if settings.tied else self.encoder.tensors())]
        self.optimizer = torch.optim.Adam(self.weights, lr=settings.learning_rate, fused=True)
        self.draw = generator(settings.seed, "references")
        self.last_kept = torch.zeros(self.decoder.n, dtype=torch.long, device=target.device)
        self.ever = torch.zeros((), device=target.device)  # coefficients kept so far
        self.histories = [History() for _ in self.blocks]
        self.step = 0

    def dead(self) -> Bool[Tensor, " v"]:
        """Directions that no sample has used for a while."""
        return self.step - self.last_kept > PATIENCE

    def objectives(self, gradients: Gradients) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, "n v"]]:
        """Loss and error of every restart, and the sparse coefficients of all."""
        done, dead = self.step / self.settings.steps, self.dead()
        if len(self.blocks) == 1:
            loss, error, s = self.objective(gradients, self.encoder, self.decoder, dead, done)
            return loss[None], error[None], s
        (z, y, gram, squares), found = gradients.products(self.encoder, self.decoder), []
        for b in self.blocks:
            products, own = Products(z[:, b], y[:, b], gram[b, b], squares), self.decoder.map(lambda x, b=b: x[b])
            objective = Objective(self.settings.sparsity, partial(of_products, products))
            found.append(objective(gradients, own, own, dead[b], done))
        losses, errors, s = zip(*found)
        return torch.stack(losses), torch.stack(errors), torch.cat(s, 1)

    def log(self, losses: Tensor, errors: Tensor, kept: Tensor, samples: int) -> None:
        """Add what this step found to every restart's history."""
        dead, n = self.dead().double().view(len(self.blocks), -1).mean(1), self.settings.n_directions
        each = kept.view(-1, n).sum(1) / samples
        for history, *values in zip(self.histories, losses, errors, each, dead, strict=True):
            history.add(self.step, *(value.item() for value in values))

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
        return {"step": self.step, "histories": [asdict(history) for history in self.histories]}

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
        self.step, self.histories = numbers["step"], [History.read(history) for history in numbers["histories"]]


def of_products(
    products: Products, rule: Sparsity, _: Gradients, __: Directions, own: Directions, done: float
) -> Everything:
    """A restart's coefficients, from products that were taken for all restarts at once."""
    return Everything(products, rule.keep_batch(products.z, done), own)


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
    """Learn the directions: of all restarts, pruned, those with the lowest training error.

    An interrupt (Ctrl-C) ends the fit early with what is learned so far.

    Raises:
        ValueError: if gradients are zero or not finite, or the checkpoint is of another fit.
    """
    state = State(target, settings, batches)
    if checkpoint is not None:
        checkpoint.read(state)
    hidden, gradients = not (progress and parallel.leads()), None
    bar = tqdm(total=settings.steps, initial=state.step, disable=hidden, desc="fit", mininterval=0.5)
    try:
        while state.step < settings.steps:
            last = state.step == settings.steps - 1
            write = checkpoint is not None and parallel.leads() and (checkpoint.due() or last)
            # What a checkpoint keeps must not be a batch ahead.
            gradients = step(state, gradients, ahead=not (write or last), log=state.step % log_every == 0 or last)
            state.step += 1
            bar.set_postfix(error=f"{min(h.error[-1] for h in state.histories):.3f}", refresh=False)
            bar.update()
            if checkpoint is not None and write:
                checkpoint.write(state)
    except KeyboardInterrupt:
        bar.write(f"interrupted: returning the directions of step {state.step}")
    bar.close()
    with torch.no_grad():
        return chosen(state, progress)


def step(state: State, gradients: Gradients | None, *, ahead: bool, log: bool) -> Gradients | None:
    """One step on a batch, which is drawn where none is given; returns the next batch, where it is drawn ahead."""
    settings, batches = state.settings, state.batches
    gradients = gradients or batches.batch(settings.batch_size, state.draw)
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
    following = batches.batch(settings.batch_size, state.draw) if ahead else None
    loss, error, kept = update()
    state.ever += kept.sum()
    if log and (state.step > 0 or settings.steps == 1) and not state.ever and not any(state.histories[0].kept):
        raise ValueError(f"all gradients are zero in the first {state.step + 1} steps: {ZERO}")
    state.last_kept[kept > 0] = state.step
    if log:
        state.log(loss, error, kept, samples)
    return following


def chosen(state: State, progress: bool) -> Fit:
    """What a state comes to: its directions with the threshold, those of the best restart where there are several."""
    settings = state.settings
    decoder = state.decoder.map(lambda factor: factor.detach())
    encoder = decoder if settings.tied else state.encoder.map(lambda factor: factor.detach())
    if settings.prune is None and settings.restarts == 1:
        z = (g.inner(encoder) for g in fresh(state, progress))
        return Fit(encoder, decoder, settings.sparsity.threshold(z), state.histories[0])
    rows = [(g.inner(encoder), g.inner(decoder), g.square_norms().sum()) for g in fresh(state, progress)]
    z, y = (torch.cat(column) for column in list(zip(*rows, strict=True))[:2])
    total = torch.stack([squares for _, _, squares in rows]).sum()
    found = []
    for block in state.blocks:
        gram = decoder.map(lambda factor, b=block: factor[b]).gram()
        found.append(earning(z[:, block], y[:, block], gram, total, settings))
    errors = [error for _, error in found]
    best = errors.index(min(errors))
    live, block, history = found[best][0], state.blocks[best], state.histories[best]
    history.restarts, history.pruned = errors, (live == 0).nonzero()[:, 0].tolist()
    keep = block.start + live.nonzero()[:, 0]
    decoder = decoder.select(keep)
    encoder = decoder if settings.tied else encoder.select(keep)
    return Fit(encoder, decoder, settings.sparsity.threshold([z[:, block] * live]), history)


def fresh(state: State, progress: bool) -> Iterator[Gradients]:
    """Fresh samples to judge directions by: at most half as many as the fit has seen."""
    batch = state.settings.batch_size
    samples = min(THRESHOLD_SAMPLES, max(1, state.step // 2) * batch)
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
