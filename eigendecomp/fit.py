"""Fitting: the objective, the batches of gradients it sees, and the loop.

Everything the objective needs of a gradient is ⟨g, u⟩ for encoder and decoder and ‖g‖² (eq. 7), so nothing here knows
how gradients are held.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from eigendecomp.directions import Directions, Factorization
from eigendecomp.divergence import Divergence
from eigendecomp.gradients import Formed, Gradients, Source
from eigendecomp.reference import Draws, Reference
from eigendecomp.sparsity import BatchTopK, Sparsity
from eigendecomp.target import Target

PATIENCE = 100  # steps without being kept after which a direction counts as dead
CACHE_BYTES = 1 << 28


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

    def __post_init__(self) -> None:
        if self.factorization not in ("cp", "tucker"):
            raise ValueError(f"factorization={self.factorization!r} must be 'cp' or 'tucker'")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate={self.learning_rate} must be positive and finite")

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


def generator(seed: int, role: str) -> torch.Generator:
    """A generator for one role, so that drawing more for one purpose changes nothing for the others."""
    return torch.Generator().manual_seed(
        seed * 1_000_003 + sum(ord(letter) * 131**i for i, letter in enumerate(role)) % 997
    )


class Batches(Protocol):
    """Gives the gradients of a batch of samples with freshly drawn references."""

    def batch(self, size: int, generator: torch.Generator) -> Gradients: ...


@dataclass
class Stream:
    """Indices 0 … n − 1 in one random order after another."""

    n: int
    left: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def take(self, count: int, generator: torch.Generator) -> Tensor:
        while len(self.left) < count:
            self.left = torch.cat([self.left, torch.randperm(self.n, generator=generator)])
        taken, self.left = self.left[:count], self.left[count:]
        return taken


class LiveBatches:
    """Differentiates the target at every step, on whole examples."""

    def __init__(self, source: Source, examples: Sequence[Tensor], draws: Draws, positions: int) -> None:
        self.source, self.examples, self.draws, self.positions = source, examples, draws, positions
        self.stream = Stream(len(examples[0]))

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        rows = self.stream.take(max(1, size // self.positions), generator)
        d = self.draws
        draws = Draws.of(d.reference, d.divergence, d.pool, (len(rows), self.positions), 1, generator)
        return self.source([tensor[rows] for tensor in self.examples], draws)


class CachedBatches:
    """Differentiates the target once: a gradient is linear in the cotangent, g = Jᵀc, so J is all there is to keep.

    A fixed reference needs less, since the gradients themselves never change.
    """

    def __init__(self, source: Source, examples: Sequence[Tensor], f: Float[Tensor, "e p k"], draws: Draws) -> None:
        self.shapes, self.draws, self.f = source.target.shapes, draws, f.flatten(0, 1)
        n, k = self.f.shape
        basis = draws if draws.reference.fixed else _Basis()
        rows = []
        for start in range(0, len(f), 256):
            part = slice(start, start + 256)
            rows.append(source([tensor[part] for tensor in examples], basis[part]).flat())
        self.jacobian = torch.cat(rows).view(n, -1, rows[0].shape[-1])
        self.stream = Stream(n)

    @staticmethod
    def size(f: Tensor, draws: Draws, target: Target) -> int:
        """Bytes that the cache takes."""
        k = 1 if draws.reference.fixed else f.shape[-1]
        return f.shape[0] * f.shape[1] * k * target.size * f.element_size()

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        rows = self.stream.take(size, generator)
        jacobian = self.jacobian[rows]
        if self.draws.reference.fixed:
            values = jacobian[:, 0]
        else:
            d = self.draws
            f = self.f[rows].unsqueeze(1)
            c = Draws.of(d.reference, d.divergence, d.pool, (size, 1), 1, generator)(f)
            values = torch.bmm(c[:, 0], jacobian)[:, 0]
        return Gradients(self.shapes, [Formed(self.shapes, values)])


class _Basis:
    """One cotangent for each output."""

    def __call__(self, f: Tensor) -> Tensor:
        k = f.shape[-1]
        return torch.eye(k, dtype=f.dtype, device=f.device).expand(*f.shape[:2], k, k)

    def __getitem__(self, rows: slice) -> "_Basis":
        return self


@dataclass
class Objective:
    """The normalised error of a batch, and what else the loop wants to know (eq. 7)."""

    sparsity: Sparsity

    def __call__(
        self, gradients: Gradients, encoder: Directions, decoder: Directions, dead: Tensor, progress: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, normalised error, and the sparse coefficients (n, v); ``progress`` is the share of the steps done."""
        z = gradients.inner(encoder)
        y = z if encoder is decoder else gradients.inner(decoder)
        square = gradients.square_norms()
        total = square.sum()
        gram = decoder.gram()
        s = self.sparsity.keep_batch(z, progress)
        error = rebuilt_error(s, y, gram, total)
        loss = error + self.sparsity.penalty(z, (total / len(z)).sqrt())
        if isinstance(self.sparsity, BatchTopK) and self.sparsity.auxiliary and dead.any():
            # The dead rebuild the residual e = g − ĝ, of which only ⟨e, u⟩ = ⟨g, u⟩ − s·gram and ‖e‖² are needed.
            fixed = s.detach()
            z_dead = z[:, dead]
            s_dead = self.sparsity.keep_batch(z_dead, 1.0)
            left = rebuilt_error(
                s_dead, y[:, dead] - fixed @ gram[:, dead], gram[dead][:, dead], error.detach() * total
            )
            loss = loss + self.sparsity.auxiliary * left
        return loss, error, s


def rebuilt_error(s: Tensor, y: Tensor, gram: Tensor, total: Tensor) -> Tensor:
    """Σ‖g − ĝ‖² / Σ‖g‖² from s, y = ⟨g, u⟩, the directions' Gram matrix and Σ‖g‖² (eq. 7)."""
    return 1 + (((s @ gram) - 2 * y) * s).sum() / total


@dataclass
class Fit:
    """What a fit leaves behind."""

    encoder: Directions
    decoder: Directions
    threshold: float | None
    history: History


def fit(source: Source, batches: Batches, settings: Settings, *, progress: bool = True, log_every: int = 50) -> Fit:
    """Learn the directions.

    Raises:
        ValueError: if gradients are zero or not finite.
    """
    target = source.target
    decoder = Directions.random(
        target.shapes,
        settings.n_directions,
        settings.rank,
        settings.factorization,
        generator=generator(settings.seed, "directions"),
        dtype=target.dtype,
        device=target.device,
    ).map(torch.nn.Parameter)
    encoder = decoder if settings.tied else decoder.map(lambda factor: torch.nn.Parameter(factor.detach().clone()))
    weights = list(decoder.tensors()) + ([] if settings.tied else list(encoder.tensors()))
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / settings.steps))
    objective = Objective(settings.sparsity)
    draw = generator(settings.seed, "batches")
    last_kept = torch.zeros(settings.n_directions, dtype=torch.long)
    history = History()

    bar = tqdm(range(settings.steps), disable=not progress, desc="fit", mininterval=0.5)
    for step in bar:
        gradients = batches.batch(settings.batch_size, draw)
        dead = step - last_kept > PATIENCE
        loss, error, s = objective(gradients, encoder, decoder, dead, step / settings.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        decoder.normalize_()
        kept = s.detach() != 0
        last_kept[kept.any(0)] = step
        if step % log_every == 0 or step == settings.steps - 1:
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss is {value} at step {step}: gradients are zero, infinite or NaN, or learning_rate="
                    f"{settings.learning_rate} is too high"
                )
            history.step.append(step)
            history.loss.append(value)
            history.error.append(error.item())
            history.kept.append(kept.sum(1).double().mean().item())
            history.dead.append(dead.double().mean().item())
            bar.set_postfix(error=f"{history.error[-1]:.3f}", dead=f"{history.dead[-1]:.2f}", refresh=False)

    encoder, decoder = (d.map(lambda factor: factor.detach()) for d in (encoder, decoder))
    with torch.no_grad():
        count = max(1, math.ceil(8192 / settings.batch_size))
        z = torch.cat([batches.batch(settings.batch_size, draw).inner(encoder) for _ in range(count)])
    return Fit(encoder, decoder, settings.sparsity.threshold(z), history)


def rate(share: float) -> float:
    """The learning rate's schedule: constant, then to zero along a cosine over the last half."""
    return 1.0 if share < 0.5 else 0.5 * (1 + math.cos(math.pi * (2 * share - 1)))
