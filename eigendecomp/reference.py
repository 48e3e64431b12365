"""References: what a sample's output is compared with. They decide the cotangent and nothing else.

A reference is prepared once from the predictions of the data it is fitted to (a *pool*: the mean, or outputs to draw
from), so that the code of a sample later depends neither on the samples beside it nor on how many there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.divergence import Divergence, KLDivergence
from eigendecomp.support.checks import whole


class Reference(ABC):
    """A rule that gives each sample the output it is compared with."""

    fixed: ClassVar[bool] = False  # a fixed reference gives a sample the same cotangent every time

    def prepare(
        self, divergence: Divergence, predictions: Float[Tensor, "n k"], generator: torch.Generator
    ) -> Float[Tensor, "m k"]:
        """The pool: what must be kept of the data. Empty where the rule needs no data.

        Raises ValueError where the rule does not fit the divergence or the number of outputs.
        """
        return predictions.new_zeros(0, predictions.shape[-1])

    def noise(
        self, divergence: Divergence, shape: tuple[int, ...], k: int, pool: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The random numbers of samples of this shape, drawn at once so that no batch size changes them."""
        return torch.zeros(shape)

    @abstractmethod
    def cotangent(
        self, divergence: Divergence, f: Float[Tensor, "... k"], pool: Float[Tensor, "m k"], noise: Tensor
    ) -> Float[Tensor, "... k"]:
        """∂D/∂f at outputs ``f``, for the references that ``noise`` selects."""


@dataclass(frozen=True)
class Draws:
    """References drawn for given samples: turns their outputs into cotangents, the same ones every time."""

    reference: Reference
    divergence: Divergence
    pool: Float[Tensor, "m k"]
    noise: Tensor  # (e, p, r) or (e, p, r, k)

    @classmethod
    def of(
        cls,
        reference: Reference,
        divergence: Divergence,
        pool: Tensor,
        shape: tuple[int, int],
        draws: int,
        generator: torch.Generator,
    ) -> "Draws":
        """``draws`` references for each of the (examples, positions) samples."""
        noise = reference.noise(divergence, (*shape, draws), pool.shape[-1], pool, generator)
        return cls(reference, divergence, pool, noise)

    def again(self, shape: tuple[int, int], draws: int, generator: torch.Generator) -> "Draws":
        """Other draws from the same pool."""
        return Draws.of(self.reference, self.divergence, self.pool, shape, draws, generator)

    def __call__(self, f: Float[Tensor, "e p k"]) -> Float[Tensor, "e p r k"]:
        if not f.isfinite().all():
            raise ValueError("the model's output is not finite for some of the inputs; remove or mend those examples")
        draws = self.noise.shape[2]
        return self.reference.cotangent(
            self.divergence, f.unsqueeze(2).expand(-1, -1, draws, -1), self.pool, self.noise
        )

    def __getitem__(self, rows: slice | Tensor) -> "Draws":
        return replace(self, noise=self.noise[rows])


@dataclass(frozen=True)
class Constant(Reference):
    """One output for every sample: a number, or one number an output (probabilities under a KL divergence)."""

    c: float | Sequence[float] = 0.0
    fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.c, Tensor):
            object.__setattr__(self, "c", self.c.tolist())
        try:
            values = torch.as_tensor(self.c)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"Constant({self.c!r}) must be a number or a list of numbers") from None
        if not torch.is_floating_point(values) and values.ndim > 0:
            raise ValueError(
                f"Constant({self.c}) holds whole numbers, which look like class labels; give one real number an "
                "output (probabilities for KLDivergence, e.g. a float one-hot row)"
            )
        if not values.double().isfinite().all():
            raise ValueError(f"Constant({self.c}) must be finite")

    def prepare(self, divergence: Divergence, predictions: Tensor, generator: torch.Generator) -> Tensor:
        k = predictions.shape[-1]
        c = torch.as_tensor(self.c, dtype=predictions.dtype)
        if c.ndim > 1 or c.numel() not in (1, k):
            raise ValueError(f"Constant has {tuple(c.shape)} values and the model {k} outputs; give 1 or {k} values")
        c = c.expand(k).reshape(1, k)
        if isinstance(divergence, KLDivergence) and ((c < 0).any() or abs(c.sum().item() - 1) > 1e-4):
            raise ValueError(f"under KLDivergence a Constant is a distribution over the {k} classes; got {self.c}")
        return c.clone()

    def cotangent(self, divergence: Divergence, f: Tensor, pool: Tensor, noise: Tensor) -> Tensor:
        return divergence.cotangent(f, pool[0].to(f))


@dataclass(frozen=True)
class Uniform(Reference):
    """The uniform distribution over the classes; for KLDivergence only."""

    fixed: ClassVar[bool] = True

    def prepare(self, divergence: Divergence, predictions: Tensor, generator: torch.Generator) -> Tensor:
        if not isinstance(divergence, KLDivergence):
            raise ValueError(
                f"Uniform() is a distribution over classes and {type(divergence).__name__} compares numbers; "
                "use KLDivergence() if the outputs are logits, else Constant(c) or Mean()"
            )
        k = predictions.shape[-1]
        return predictions.new_full((1, k), 1 / k)

    cotangent = Constant.cotangent


@dataclass(frozen=True)
class Mean(Reference):
    """The mean prediction over the data of the fit."""

    fixed: ClassVar[bool] = True

    def prepare(self, divergence: Divergence, predictions: Tensor, generator: torch.Generator) -> Tensor:
        return predictions.mean(0, keepdim=True)

    cotangent = Constant.cotangent


@dataclass(frozen=True)
class OtherSample(Reference):
    """The prediction of a sample drawn at random from a pool of ``pool`` samples of the fit's data."""

    pool: int = 1024

    def __post_init__(self) -> None:
        whole("OtherSample: pool (of samples to draw from)", self.pool, 2)

    def prepare(self, divergence: Divergence, predictions: Tensor, generator: torch.Generator) -> Tensor:
        if len(predictions) < 2:
            raise ValueError("OtherSample() draws another sample and the inputs hold one; give two or more, or Mean()")
        order = torch.randperm(len(predictions), generator=generator)[: self.pool]
        return predictions[order].clone()

    def noise(
        self, divergence: Divergence, shape: tuple[int, ...], k: int, pool: Tensor, generator: torch.Generator
    ) -> Tensor:
        return torch.randint(len(pool), shape, generator=generator)

    def cotangent(self, divergence: Divergence, f: Tensor, pool: Tensor, noise: Tensor) -> Tensor:
        return divergence.cotangent(f, pool.to(f)[noise])


@dataclass(frozen=True)
class ModelSample(Reference):
    """A draw from the model itself, made so that E[c cᵀ] = S and hence E[g gᵀ] = H(x), exactly (eq. 6).

    Under KLDivergence the cotangent is p − onehot(y) with y ~ p; under SquaredError it is √2 times standard noise.
    """

    def noise(
        self, divergence: Divergence, shape: tuple[int, ...], k: int, pool: Tensor, generator: torch.Generator
    ) -> Tensor:
        return divergence.noise(shape, k, generator)

    def cotangent(self, divergence: Divergence, f: Tensor, pool: Tensor, noise: Tensor) -> Tensor:
        return divergence.draw(f, noise)
