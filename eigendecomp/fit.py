"""Fitting: the objective, the batches of gradients it sees, and the loop.

Everything the objective needs of a gradient is ⟨g, u⟩ for encoder and decoder and ‖g‖² (eq. 7), so nothing here knows
how gradients are held.
"""

import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from eigendecomp import files, parallel
from eigendecomp.checks import real, whole
from eigendecomp.data import Examples, Feed, Shuffled
from eigendecomp.directions import Directions, Factorization
from eigendecomp.divergence import Divergence
from eigendecomp.gradients import Formed, Gradients, Source
from eigendecomp.reference import Draws, Reference
from eigendecomp.sparsity import BatchTopK, Sparsity
from eigendecomp.target import Target

PATIENCE = 100  # steps without being kept after which a direction counts as dead
CACHE_BYTES = 1 << 28  # a Jacobian up to this size is kept instead of being computed at every step
THRESHOLD_SAMPLES = 8192  # from which the inference threshold is read
WRITE_SHARE = 1 / 40  # of a long fit's time goes into its checkpoints, at most
CANCELLATION = 1e-2  # weight against CP terms that grow and cancel, from twice the squares they need
ZERO = "does the output depend on the chosen parameters, and differ from the reference?"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fit, besides the target and the data."""

    divergence: Divergence
    reference: Reference
    parameters: tuple[str, ...]
    n_directions: int
    rank: int
    factorization: Factorization
    tied: bool
    sparsity: Sparsity
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    interference: float | None = None  # weight of the direct method's second loss; None for a fit of gradients

    def __post_init__(self) -> None:
        for name in ("n_directions", "rank", "steps", "batch_size"):
            whole(name, getattr(self, name))
        whole("seed", self.seed, 0)
        real("learning_rate", self.learning_rate, above=0)
        if self.interference is not None:
            real("interference", self.interference, least=0)
        if self.factorization not in ("cp", "tucker"):
            raise ValueError(f"factorization={self.factorization!r} must be 'cp' or 'tucker'")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied={self.tied!r} must be True or False")
        for name, kind in (("divergence", Divergence), ("reference", Reference), ("sparsity", Sparsity)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be a {kind.__name__}, such as those in eigendecomp"
                )

    def as_json(self) -> dict[str, Any]:
        """Plain values only, each object as its name and its fields."""
        plain = {key: value for key, value in vars(self).items()}
        for key in ("divergence", "reference", "sparsity"):
            value = plain[key]
            plain[key] = {"name": type(value).__name__, **asdict(value)}
        return plain | {"parameters": list(self.parameters)}


@dataclass
class History:
    """What happened, by step: loss, normalised error, coefficients kept a sample, share of dead directions."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float, error: float, kept: float, dead: float) -> None:
        for name, value in zip(vars(self), (step, loss, error, kept, dead), strict=True):
            getattr(self, name).append(value)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Self:
        """The history whose fields a file holds; ValueError if they are not lists of numbers."""
        for name, values in plain.items():
            if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
                raise ValueError(f"the history of {name!r} is not a list of numbers")
        return cls(**{name: list(values) for name, values in plain.items()})


def generator(seed: int, role: str) -> torch.Generator:
    """A generator for one role, so that drawing more for one purpose changes nothing for the others."""
    # torch reads only the lower 32 bits of a seed, so both must be mixed into them.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {role}".encode()))


class Batches(Protocol):
    """Gives the gradients of a batch of samples with freshly drawn references."""

    @property
    def feed(self) -> Feed: ...

    def batch(self, size: int, generator: torch.Generator) -> Gradients: ...


class LiveBatches:
    """Differentiates the target at every step, on whole examples."""

    def __init__(self, source: Source, feed: Feed, draws: Draws, positions: int) -> None:
        self.source, self.feed, self.draws, self.positions = source, feed, draws, positions

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        count = max(1, size // self.positions)
        draws = self.draws.again((count, self.positions), 1, generator)
        return self.source(self.feed.take(count), draws[parallel.share(count)])


class CachedBatches:
    """Differentiates the target once: a gradient is linear in the cotangent, g = Jᵀc, so J is all there is to keep.

    A fixed reference needs less, since the gradients themselves never change.
    """

    def __init__(
        self, source: Source, examples: Examples, f: Float[Tensor, "e p k"], draws: Draws, generator: torch.Generator
    ) -> None:
        self.shapes, self.draws, self.f = source.target.shapes, draws, f.flatten(0, 1)
        basis = draws.again((f.shape[0], f.shape[1]), 1, generator) if draws.reference.fixed else Basis()
        rows = []
        for start in range(0, len(f), 256):
            part = slice(start, start + 256)
            rows.append(source([tensor[part] for tensor in examples], basis[part]).flat())
        self.jacobian = torch.cat(rows).view(len(self.f), -1, rows[0].shape[-1])
        if not self.jacobian.isfinite().all():
            bad = ~self.jacobian.isfinite().flatten(1).all(1)
            raise ValueError(
                f"the gradient is NaN or infinite for {int(bad.sum())} of {len(bad)} samples, first for sample "
                f"{int(bad.nonzero()[0])}; remove those examples, or smooth the model where it has no slope"
            )
        if not self.jacobian.any():
            raise ValueError(f"all gradients are zero: {ZERO}")
        self.feed = Shuffled((self.f,), len(self.f), generator)

    @staticmethod
    def size(f: Float[Tensor, "e p k"], examples: int, reference: Reference, target: Target) -> int:
        """Bytes that the cache of so many examples takes, told from the outputs of a few."""
        k = 1 if reference.fixed else f.shape[-1]
        return examples * f.shape[1] * k * target.size * f.element_size()

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        share = parallel.share(size)
        rows = self.feed.indices(size)[share]
        jacobian = self.jacobian[rows]
        if self.draws.reference.fixed:
            values = jacobian[:, 0]
        else:
            c = self.draws.again((size, 1), 1, generator)[share](self.f[rows].unsqueeze(1))
            values = torch.bmm(c[:, 0], jacobian)[:, 0]
        return Gradients(self.shapes, [Formed(self.shapes, values)])


class Basis:
    """One cotangent for each output."""

    def __call__(self, f: Tensor) -> Tensor:
        k = f.shape[-1]
        return torch.eye(k, dtype=f.dtype, device=f.device).expand(*f.shape[:2], k, k)

    def __getitem__(self, rows: slice) -> "Basis":
        return self


@dataclass
class Objective:
    """The normalised error of a batch, and what else the loop wants to know (eq. 7)."""

    sparsity: Sparsity

    def __call__(
        self, gradients: Gradients, encoder: Directions, decoder: Directions, dead: Tensor, progress: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, normalised error of the batch, and the sparse coefficients (n, v).

        With several processes loss and error are this one's parts: over all processes they add up to the batch's.
        ``progress`` is the share of the steps done.
        """
        norms = parallel.sums(gradients.square_norms().sum())
        z, y, gram = gradients.inner_and_gram(encoder, decoder)
        n = len(z) * parallel.processes()
        s = self.sparsity.keep_batch(z, progress)
        # A batch of sparse data may have no gradient at all; it then has no say.
        total = norms()[0].clamp_min(torch.finfo(y.dtype).tiny)
        error = 1 / parallel.processes() + error_change(s, y, gram) / total
        loss = error + self.sparsity.penalty(z, n, (total / n).sqrt())
        if isinstance(self.sparsity, BatchTopK) and self.sparsity.auxiliary and dead.any():
            # The dead rebuild the residual e = g − ĝ, of which only ⟨e, u⟩ = ⟨g, u⟩ − s·gram and ‖e‖² are needed.
            # The residual is given: the live directions that leave it learn nothing from this.
            residual = parallel.sums(error)
            few, rest = decoder.select(dead.nonzero()[:, 0]), decoder.map(Tensor.detach)
            s_dead = self.sparsity.keep_batch(z[:, dead], 1.0)
            y_dead = y[:, dead] - s.detach() @ rest.gram(few)
            left = error_change(s_dead, y_dead, few.gram()) / (residual()[0].clamp_min(1e-6) * total)
            loss = loss + self.sparsity.auxiliary * left
        if decoder.sums_terms:
            # A best CP fit need not exist: terms can grow without bound against each other (de Silva and Lim, 2008).
            excess = (decoder.cancellation() - 2).clamp_min(0).mean()
            loss = loss + CANCELLATION * excess / parallel.processes()
        return loss, error, s


def error_change(s: Tensor, y: Tensor, gram: Tensor) -> Tensor:
    """Σ‖g − ĝ‖² − Σ‖g‖² from s, y = ⟨g, u⟩ and the directions' Gram matrix: sᵀ gram s − 2 s·y (eq. 7)."""
    return (((s @ gram) - 2 * y) * s).sum()


@dataclass
class Fit:
    """What a fit leaves behind."""

    encoder: Directions
    decoder: Directions
    threshold: float | None
    history: History


@dataclass
class Checkpoint:
    """Where a fit is kept as it goes on, and what it must be a fit of."""

    path: Path
    identity: dict[str, Any]  # settings, target and data, as plain values
    seconds: float  # between two writes, at least
    written: float = field(default_factory=time.monotonic)
    taken: float = 0.0

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.interval()

    def interval(self) -> float:
        """Seconds between two writes: as chosen, or longer where writing would take more than its share of the time."""
        return max(self.seconds, self.taken / WRITE_SHARE)

    def write(self, state: "State") -> None:
        start = time.monotonic()
        files.write(self.path, state.tensors(), {"identity": self.identity, **state.numbers()})
        self.written = time.monotonic()
        self.taken = self.written - start

    def read(self, state: "State") -> None:
        """Put what is kept, if anything is, into ``state``.

        Raises:
            ValueError: if the file is damaged, or of another fit; the difference is spelled out.
        """
        if not self.path.exists():
            return
        tensors, numbers = files.read(self.path)
        identity = numbers.get("identity")
        theirs, ours = flatten(identity if isinstance(identity, dict) else {}), flatten(self.identity)
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if differing:
            told = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing)
            raise ValueError(
                f"checkpoint {str(self.path)!r} is of another fit ({told}); delete it or choose another path"
            )
        try:
            state.restore(tensors, numbers)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r} does not hold a fit's state ({error}); delete it or choose another path"
            ) from None


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


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
) -> Fit:
    """Learn the directions. An interrupt (Ctrl-C) ends the fit early with what is learned so far.

    Raises:
        ValueError: if gradients are zero or not finite, or the checkpoint is of another fit.
    """
    state = State(target, settings, batches)
    if checkpoint is not None:
        checkpoint.read(state)
    objective, ever = Objective(settings.sparsity), torch.zeros((), device=target.device)
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
    with torch.no_grad():
        size = settings.batch_size * math.ceil(256 / settings.batch_size)  # small batches would take too many
        count = math.ceil(THRESHOLD_SAMPLES / size)
        z = torch.cat([batches.batch(size, state.draw).inner(encoder) for _ in range(count)])
    return Fit(encoder, decoder, settings.sparsity.threshold(z), state.history)


def rate(share: float) -> float:
    """The learning rate's schedule: constant, then to zero along a cosine over the last half."""
    return 1.0 if share < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * share - 1)))
