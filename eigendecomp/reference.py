"""References: what a sample's output is compared with. They decide the cotangent and nothing else.

A reference is prepared once from the predictions of the data it is fitted to (a *pool*: the mean, or outputs to draw
from), so that the code of a sample later depends neither on the samples beside it nor on how many there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from eigendecomp.divergence import Divergence
from eigendecomp.support.checks import finite, one_output, whole
from eigendecomp.support.rows import PIECE, Rows, slices


class Reference(ABC):
    """A rule that gives each sample the output it is compared with."""

    fixed: ClassVar[bool] = False  # a fixed reference gives a sample the same cotangent every time

    def prepare(
        self, divergence: Divergence, predictions: Float[Tensor, "n k"] | Rows, generator: torch.Generator
    ) -> Float[Tensor, "m k"]:
        """The pool: what must be kept of the data. Empty where the rule needs no data.

        Raises ValueError where the rule does not fit the divergence or the number of outputs.
        """
        return predictions[:0].clone()

    def noise(self, divergence: Divergence, shape: tuple[int, ...], pool: Tensor, generator: torch.Generator) -> Tensor:
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
        return cls(reference, divergence, pool, reference.noise(divergence, (*shape, draws), pool, generator))

    def again(self, shape: tuple[int, int], draws: int, generator: torch.Generator) -> "Draws":
        """Other draws from the same pool."""
        return Draws.of(self.reference, self.divergence, self.pool, shape, draws, generator)

    def __call__(self, f: Float[Tensor, "e p k"]) -> Float[Tensor, "e p r k"]:
        f = repeat(f, "e p k -> e p r k", r=self.noise.shape[2])  # a view
        few = max(1, PIECE // max(1, f[:1].numel()))
        if few >= len(f):
            return self.reference.cotangent(self.divergence, finite(f), self.pool, self.noise)
        c = f.new_empty(f.shape)  # of a large vocabulary nothing but the result is there for all examples
        for some in slices(len(f), few):
            c[some] = self.reference.cotangent(self.divergence, finite(f[some]), self.pool, self.noise[some])
        return c

    def __getitem__(self, examples: slice | Tensor) -> "Draws":
        return replace(self, noise=self.noise[examples])


@dataclass(frozen=True)
class Constant(Reference):
    """One output for every sample: a number, or one number an output (probabilities under a KL divergence)."""

    c: float | Sequence[float] = 0.0
    fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", one_output(self.c))

    def prepare(self, divergence: Divergence, predictions: Tensor | Rows, generator: torch.Generator) -> Tensor:
        k = predictions.shape[-1]
        c = torch.as_tensor(self.c, dtype=predictions[:0].dtype)
        if c.ndim > 1 or c.numel() not in (1, k):
            raise ValueError(f"Constant has {tuple(c.shape)} values and the model {k} outputs; give 1 or {k} values")
        divergence.check_reference(c.expand(k))
        return c.expand(k).reshape(1, k).clone()

    def cotangent(self, divergence: Divergence, f: Tensor, pool: Tensor, noise: Tensor) -> Tensor:
        return divergence.cotangent(f, pool[0].to(f))


@dataclass(frozen=True)
class Uniform(Reference):
    """The uniform distribution over the classes; for KLDivergence only."""

    fixed: ClassVar[bool] = True

    def prepare(self, divergence: Divergence, predictions: Tensor | Rows, generator: torch.Generator) -> Tensor:
        return torch.full_like(predictions[:1], divergence.uniform(predictions.shape[-1]))

    cotangent = Constant.cotangent


@dataclass(frozen=True)
class Mean(Reference):
    """The mean prediction over the data of the fit."""

    fixed: ClassVar[bool] = True

    def prepare(self, divergence: Divergence, predictions: Tensor | Rows, generator: torch.Generator) -> Tensor:
        return predictions.mean(0, keepdim=True)

    cotangent = Constant.cotangent


@dataclass(frozen=True)
class OtherSample(Reference):
    """The prediction of a sample drawn at random from a pool of ``pool`` samples of the fit's data."""

    pool: int = 1024

    def __post_init__(self) -> None:
        whole("OtherSample: pool (of samples to draw from)", self.pool, 2)

    def prepare(self, divergence: Divergence, predictions: Tensor | Rows, generator: torch.Generator) -> Tensor:
        if len(predictions) < 2:
            raise ValueError("OtherSample() draws another sample and the inputs hold one; give two or more, or Mean()")
        order = torch.randperm(len(predictions), generator=generator)[: self.pool]
        return predictions[order]

    def noise(self, divergence: Divergence, shape: tuple[int, ...], pool: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(len(pool), shape, generator=generator)

    def cotangent(self, divergence: Divergence, f: Tensor, pool: Tensor, noise: Tensor) -> Tensor:
        return divergence.cotangent(f, pool.to(f)[noise])


@dataclass(frozen=True)
class ModelSample(Reference):
    """A draw from the model itself, made so that E[c cᵀ] = S and hence E[g gᵀ] = H(x), exactly (eq. 6).

    Under KLDivergence the cotangent is p − onehot(y) with y ~ p; under SquaredError it is √2 times standard noise.
    """

    def noise(self, divergence: Divergence, shape: tuple[int, ...], pool: Tensor, generator: torch.Generator) -> Tensor:
        return divergence.noise(shape, pool.shape[-1], generator)

    def cotangent(self, divergence: Divergence, f: Tensor, pool: Tensor, noise: Tensor) -> Tensor:
        return divergence.draw(f, noise)
