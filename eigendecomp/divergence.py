"""Divergences between two outputs, with the two derivatives that the method needs.

Outputs are written ``f`` (logits for a classifier or a language model) and references ``r``. A reference lives in the
space of *predictions*: the outputs themselves for a squared error, probabilities for a Kullback–Leibler divergence.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


class Divergence(ABC):
    """How far an output is from a reference, one number a sample."""

    has_minimum: ClassVar[bool] = True  # whether D(f', f) is smallest at f' = f, so that its curvature is S

    def check(self, k: int) -> None:  # noqa: B027 (most compare any number of outputs)
        """Raise ValueError if outputs of ``k`` numbers cannot be compared this way."""

    def check_reference(self, r: Float[Tensor, "... k"]) -> None:  # noqa: B027
        """Raise ValueError if ``r`` is no prediction, so that nothing can be compared with it."""

    def uniform(self, k: int) -> float:
        """The entries of the uniform prediction; ValueError where predictions are no distributions."""
        raise ValueError(
            f"Uniform() is a distribution over classes and {type(self).__name__} compares numbers; "
            "use KLDivergence() if the outputs are logits, else Constant(c) or Mean()"
        )

    @abstractmethod
    def predict(self, f: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
        """The prediction that an output stands for, in the space in which references live."""

    @abstractmethod
    def value(self, f: Float[Tensor, "... k"], r: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
        """D(f, r) (eq. 1)."""

    @abstractmethod
    def cotangent(self, f: Float[Tensor, "... k"], r: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
        """c = ∂D/∂f; the reference decides nothing else (eq. 2)."""

    @abstractmethod
    def root(self, f: Float[Tensor, "... k"], y: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
        """R y with RᵀR = S, the curvature of D(f', f) in f' at f' = f; so ‖R J u‖² = uᵀ H u (eq. 4)."""

    @abstractmethod
    def draw(self, f: Float[Tensor, "... k"], noise: Float[Tensor, "..."]) -> Float[Tensor, "... k"]:
        """A cotangent c with E[c cᵀ] = S, made from the noise of :meth:`noise` (eq. 6)."""

    @abstractmethod
    def noise(self, shape: tuple[int, ...], k: int, generator: torch.Generator) -> Tensor:
        """What :meth:`draw` needs for samples of this shape with ``k`` outputs."""


@dataclass(frozen=True)
class SquaredError(Divergence):
    """D(f, r) = Σ_k (f_k − r_k)², with curvature S = 2I."""

    def predict(self, f: Tensor) -> Tensor:
        return f

    def value(self, f: Tensor, r: Tensor) -> Tensor:
        return (f - r).square().sum(-1)

    def cotangent(self, f: Tensor, r: Tensor) -> Tensor:
        return 2 * (f - r)

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        return 2**0.5 * y

    def noise(self, shape: tuple[int, ...], k: int, generator: torch.Generator) -> Tensor:
        # From uniform numbers: torch.randn gives others to the first samples when it is asked for more of them.
        u = torch.rand(*shape, k, 2, generator=generator)
        return (-2 * (1 - u[..., 0]).log()).sqrt() * (2 * torch.pi * u[..., 1]).cos()

    def draw(self, f: Tensor, noise: Tensor) -> Tensor:
        return 2**0.5 * noise.to(f)


@dataclass(frozen=True)
class OutputSum(SquaredError):
    """The draft's first-order baseline D'(f) = Σ_k f_k − c: its cotangent is all ones, whatever the reference.

    Curvature, and with it ``activation``, is that of the squared error, as in the draft.
    """

    has_minimum: ClassVar[bool] = False

    def value(self, f: Tensor, r: Tensor) -> Tensor:
        return (f - r).sum(-1)

    def cotangent(self, f: Tensor, r: Tensor) -> Tensor:
        return torch.ones_like(f).expand(torch.broadcast_shapes(f.shape, r.shape))


@dataclass(frozen=True)
class KLDivergence(Divergence):
    """D(f, q) = Σ_k q_k log(q_k / p_k) with p = softmax(f); S = diag(p) − ppᵀ. Outputs are logits."""

    def check(self, k: int) -> None:
        if k < 2:
            raise ValueError("KLDivergence compares distributions and the model has one output; use SquaredError()")

    def check_reference(self, r: Tensor) -> None:
        if (r < 0).any() or ((r.sum(-1) - 1).abs() > 1e-4).any():
            raise ValueError(
                f"under KLDivergence a reference is a distribution over the {r.shape[-1]} classes; got {r.tolist()}"
            )

    def uniform(self, k: int) -> float:
        return 1 / k

    def predict(self, f: Tensor) -> Tensor:
        return f.softmax(-1)

    def value(self, f: Tensor, r: Tensor) -> Tensor:
        return (torch.xlogy(r, r) - r * f.log_softmax(-1)).sum(-1)

    def cotangent(self, f: Tensor, r: Tensor) -> Tensor:
        return f.softmax(-1) - r

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        # R = diag(√p)(I − 1pᵀ): RᵀR = diag(p) − ppᵀ, without a K × K square root.
        p = f.softmax(-1)
        return p.sqrt() * (y - (p * y).sum(-1, keepdim=True))

    def noise(self, shape: tuple[int, ...], k: int, generator: torch.Generator) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def draw(self, f: Tensor, noise: Tensor) -> Tensor:
        # c = p − onehot(y), y ~ p by inverting the distribution function.
        p = f.softmax(-1)
        cdf = p.cumsum(-1)
        y = torch.searchsorted(cdf, noise.to(f).unsqueeze(-1) * cdf[..., -1:])
        onehot = torch.zeros_like(p).scatter(-1, y.clamp(max=p.shape[-1] - 1), 1.0)
        return p - onehot
