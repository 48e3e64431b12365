"""A guard against gradients that are wrong in silence.

How the uses of a parameter are read is found from three examples. Later batches may differ from them: they are
sorted, ragged, or reach an expert that the three did not. So captured gradients are compared with one ordinary backward
pass of the model itself, on the calls 1, 2, 4, 8, …: Σ_i r_i g_i = ∇ Σ_i r_i ⟨c_i, f_i⟩ with random weights r_i of both
signs. Without them, gradients that are given to the wrong samples would not show; and equal examples of opposite signs
alone would leave nothing but rounding.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.gradients import Cotangents
from eigendecomp.support import parallel
from eigendecomp.support.rows import PIECE, slices
from eigendecomp.target import Target

SMALL = 1e-3  # a gradient below this share of all parameters' may be off by the rounding of the others


class Mistaken(Exception):
    """Earlier batches held wrong gradients; later ones are right."""


class Guard:
    """Compares what was captured with what autograd says.

    Args:
        target: the model, which is run as it is.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.calls = 0
        self.few = 2  # examples that are looked at together
        self.tolerance = exactness(target.dtype)
        self.generator = torch.Generator().manual_seed(0)

    def due(self) -> bool:
        """Whether this call is one of those that are looked at: the first, second, fourth, eighth, …"""
        self.calls += 1
        return self.calls & (self.calls - 1) == 0

    def wrong(
        self,
        pieces: Sequence[tuple[Sequence[Tensor], Cotangents]],
        weighted: Callable[[Float[Tensor, " n"]], Mapping[str, Tensor]],
        whole: bool = False,
    ) -> list[str]:
        """Names of the parameters whose captured gradients are not autograd's.

        Args:
            pieces: the examples of the gradients, in order, in parts that fit into memory.
            weighted: gives Σ_n weight_n g_n of the captured gradients, for every parameter.
            whole: whether a sample is an example with all its positions, instead of one position.

        Raises:
            ValueError: if an example's output depends on the examples beside it.
        """
        weights, totals = [], {name: torch.zeros(shape) for name, shape in self.target.shapes.items()}
        for all_of_piece, draws, some in ((*piece, s) for piece in pieces for s in slices(len(piece[0][0]), self.few)):
            examples, cotangents = [tensor[some] for tensor in all_of_piece], draws[some]
            with self.target.differentiable() as chosen:
                f = self.target.itself(examples)
                c = cotangents(f.detach())
                shape = c.shape[0], 1 if whole else c.shape[1], c.shape[2]
                weights.append(torch.randn(shape, generator=self.generator).to(c))
                total = torch.einsum("epr,eprk->epk", weights[-1].expand(c.shape[:3]), c)
                own = torch.autograd.grad(f, chosen, total, allow_unused=True, materialize_grads=True)
            totals = {name: totals[name].to(g) + g.view(totals[name].shape) for name, g in zip(totals, own)}
            self._check_alone(examples, f.detach())
        return differing(weighted(torch.cat([each.flatten() for each in weights])), totals, self.tolerance)

    def _check_alone(self, examples: Sequence[Tensor], f: Float[Tensor, "e p k"]) -> None:
        """Two examples give alone what they give among the others."""
        if len(f) == 1:
            return
        for i in torch.randint(len(f), (2,), generator=self.generator).tolist():
            with torch.no_grad():
                alone = self.target.call([tensor[i : i + 1] for tensor in examples])
            check_same(alone, f[i : i + 1], f)

    def check_first(self, examples: Sequence[Tensor], c: Float[Tensor, "e p k"], position: int) -> dict[str, Tensor]:
        """The gradient of the first example's sample at a position, by autograd, after the model itself was checked.

        Raises:
            ValueError: if two runs differ, examples depend on each other, a gradient is not finite, or the model
                reaches a parameter otherwise than as its own attribute.
        """
        target = self.target
        with torch.no_grad():
            f = target.call(examples)
            self.few = max(2, PIECE // f[0].numel())
            close(f, target.call(examples), f, "two runs of the model on the same inputs differ; call model.eval() "
                  "and remove randomness")  # fmt: skip
        check_same(target.call([tensor[:1] for tensor in examples]).detach(), f[:1], f)
        leaves = list(target.chosen.values())
        with torch.enable_grad():
            replaced = torch.autograd.grad(target.call(examples), leaves, c, allow_unused=True, materialize_grads=True)
        own = self._backward(examples, c)
        hidden = differing(dict(zip(target.names, replaced, strict=True)), own, coarse(target.dtype))
        if hidden:
            raise ValueError(
                f"the model reaches {hidden[0]!r} through a plain Python reference as well, in a list or a closure, so "
                "that it cannot be run with other values; let it use the module's attribute, self.weight"
            )
        self._measure_rounding(examples, c, own)
        only = torch.zeros_like(c[:1])
        only[:, position] = c[:1, position]
        truth = self._backward([tensor[:1] for tensor in examples], only)
        for name, g in truth.items():
            if not g.isfinite().all():
                raise ValueError(
                    f"the gradient of {name!r} is NaN or infinite for the first example; remove or mend it"
                )
        return truth

    def _measure_rounding(self, examples: Sequence[Tensor], c: Float[Tensor, "e p k"], own: dict[str, Tensor]) -> None:
        """A model in float64 may compute parts of itself in float32: autograd's sums then agree no better."""
        if self.tolerance >= 1e-3:
            return
        half = (torch.randint(2, c.shape, generator=self.generator) == 1).to(c.device)
        one, other = (self._backward(examples, c * mask) for mask in (half, ~half))
        while self.tolerance < 1e-3 and differing(
            {name: one[name] + other[name] for name in own}, own, self.tolerance / 30
        ):
            self.tolerance *= 10

    def _backward(self, examples: Sequence[Tensor], c: Float[Tensor, "e p k"]) -> dict[str, Tensor]:
        with self.target.differentiable() as chosen:
            f = self.target.itself(examples)
            own = torch.autograd.grad(f, chosen, c, allow_unused=True, materialize_grads=True)
        return dict(zip(self.target.names, own, strict=True))


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float) -> list[str]:
    """The names under which ``a`` is not ``b``, up to a share of b's norm; what is not finite in b is left aside."""
    norms = {name: g.norm() for name, g in b.items() if g.isfinite().all()}
    if not norms:
        return []
    most = torch.stack(list(norms.values())).norm()
    return [
        name
        for name, g in b.items()
        if name in norms and not (a[name].reshape(g.shape) - g).norm() <= tolerance * (norms[name] + SMALL * most)
    ]


def check_same(alone: Tensor, beside: Tensor, f: Tensor) -> None:
    """Raises ValueError if an example alone gives another output than beside others."""
    close(
        alone, beside, f,
        "the model's output for one example changes with the examples beside it; per-sample gradients need "
        "independent examples along the first axis (is a layer normalising over the batch?)",
    )  # fmt: skip


def close(a: Tensor, b: Tensor, f: Tensor, otherwise: str) -> None:
    """Raises ValueError with these words where two outputs differ by more than rounding at the size of f."""
    tolerance = coarse(f.dtype)
    most = tolerance * float(largest(f))
    if not all(torch.allclose(x, y, tolerance, most) for x, y in zip(a, b, strict=True)):  # it copies what it is given
        raise ValueError(otherwise)


def largest(f: Tensor) -> Float[Tensor, ""]:
    """The largest absolute value, without a copy of all."""
    return torch.stack(f.aminmax()).abs().max()


def coarse(dtype: torch.dtype) -> float:
    """A relative difference that two ways through a model may have."""
    dtype = parallel.precision() or dtype
    return 1e-7 if dtype == torch.float64 else min(0.3, 30 * torch.finfo(dtype).eps ** 0.5)


def exactness(dtype: torch.dtype) -> float:
    """A relative difference that captured gradients may have: 1e-3, in float64 1e-8; coarser in half precision."""
    if parallel.precision():
        return coarse(dtype)
    return 1e-8 if dtype == torch.float64 else 1e-3
