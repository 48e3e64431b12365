"""Curvature: per-sample Hessians, and how far the output moves along directions, without forming a Hessian.

At the target's own parameters the divergence from its own output has no residual, so its Hessian is exactly
H(x) = Jᵀ S J (eq. 4), with S = 2I for a squared error and diag(p) − ppᵀ for a KL divergence over logits. Everything
below is read from R(x) = S^½ J, of which H = RᵀR: nothing here differentiates twice but the check that this is so.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence
from eigendecomp.gradients import EachOutput, FunctionalSource, Source
from eigendecomp.support.checks import choice, finite
from eigendecomp.support.examples import Inputs, as_examples, chunks
from eigendecomp.support.models import at_once
from eigendecomp.target import Target

LARGEST_DENSE = 4096  # parameters beyond which a dense Hessian is refused
BUDGET = 1 << 28  # bytes of tangents at a time

log = logging.getLogger(__name__)


def hessian_root(
    model: nn.Module, x: Inputs, divergence: Divergence, *, parameters: Sequence[str] = ("*",)
) -> Float[Tensor, "n k w"]:
    """R(x) = S^½ J of every sample, formed: K rows of parameters, and H(x) = RᵀR. Small models only."""
    target, examples = Target(model, parameters), as_examples(x)
    f = target.outputs(examples).flatten(0, 1)
    j = jacobian(target, examples)
    return divergence.root(f.unsqueeze(1), j.mT).mT  # S^½ acts on the outputs, which it wants last


def jacobian(target: Target, examples: Sequence[Tensor]) -> Float[Tensor, "n k w"]:
    """J = ∂f/∂w of every sample, formed; small models only."""
    batched, looped = FunctionalSource(target), FunctionalSource(target, loop=True)
    alone, j = looped([tensor[:1] for tensor in examples], EachOutput()).flat(), batched(examples, EachOutput()).flat()
    if (j[: len(alone)] - alone).norm() > 1e-3 * alone.norm():  # torch batches some layers (cdist) wrongly
        j = looped(examples, EachOutput()).flat()
    return rearrange(j, "(n k) w -> n k w", k=target.outputs(examples).shape[-1])


def per_sample_hessian(
    model: nn.Module, x: Inputs, divergence: Divergence, *, parameters: Sequence[str] = ("*",), method: str = "closed"
) -> Float[Tensor, "n w w"]:
    """H(x) = ∇²_w D(f(x, w), f(x, w₀)) at w₀ for every sample, dense; small models only.

    Args:
        method: ``"closed"`` for JᵀSJ, ``"autograd"`` for the second derivative taken twice through the model.

    Raises:
        ValueError: if more than ``LARGEST_DENSE`` parameters are chosen, the method is unknown, or the divergence has
            no minimum to take the second derivative at.
    """
    target, examples = Target(model, parameters), as_examples(x)
    if target.size > LARGEST_DENSE:
        raise ValueError(
            f"a dense Hessian over {target.size} parameters is too large; choose at most {LARGEST_DENSE} with "
            "parameters=[...], or use activation(), which never forms it"
        )
    if method == "closed":
        root = hessian_root(model, x, divergence, parameters=parameters)
        return root.mT @ root
    choice("method", method, "closed", "autograd")
    if not divergence.has_minimum:
        raise ValueError(
            f"{type(divergence).__name__}() is linear in the outputs and has no minimum; its curvature is that of "
            "SquaredError(), which method='closed' returns"
        )
    sizes = [p.numel() for p in target.chosen.values()]
    w0 = torch.cat([p.detach().flatten() for p in target.chosen.values()])
    reference = divergence.predict(target.outputs(examples))

    def d(w: Tensor, r: Float[Tensor, "p k"], *example: Tensor) -> Float[Tensor, " p"]:
        values = {name: x.view_as(p) for (name, p), x in zip(target.chosen.items(), w.split(sizes), strict=True)}
        return divergence.value(target.call([tensor.unsqueeze(0) for tensor in example], values)[0], r)

    hessian = torch.func.vmap(torch.func.hessian(d), in_dims=(None, 0, *[0] * len(examples)))
    return hessian(w0, reference, *examples).flatten(0, 1)


def push_forward(
    target: Target,
    divergence: Divergence,
    directions: Directions,
    examples: Sequence[Tensor],
    *,
    source: Source | None = None,
    keep: Callable[[Float[Tensor, "... k"]], Tensor] = lambda moved: moved,
) -> Float[Tensor, "n v k"]:
    """S^½ J u of every sample and direction (eq. 5): forwards, or backwards through ``source`` where outputs are few.

    Its squared length is uᵀ H(x) u, and the inner product of two directions' is uᵀ H(x) u'. Differentiable in the
    directions. They are formed a few at a time: ``BUDGET`` bounds the bytes in use, besides those of the result, which
    is what ``keep`` makes of every S^½ J u.
    """
    push = Push(target, divergence, directions, keep)
    if source is not None:
        p, k = target.outputs(tuple(tensor[:1] for tensor in examples)).shape[1:]
        if p * k <= directions.n:
            return push.backwards(examples, source)
    try:
        return push.forwards(examples)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("the model cannot be differentiated forwards, so each output is taken backwards: %s", error)
    oracle = FunctionalSource(target, loop=True)
    return torch.cat([push.backwards(one, oracle) for one in chunks(tuple(examples), 1)])


@torch.no_grad()
def curvatures(
    target: Target,
    divergence: Divergence,
    directions: Directions,
    examples: Sequence[Tensor],
    source: Source | None = None,
) -> Float[Tensor, "n v"]:
    """uᵀ H(x) u of every sample and direction, without keeping S^½ J u, which is K times larger."""
    square = lambda moved: moved.square_().sum(-1)  # noqa: E731
    return push_forward(target, divergence, directions, examples, source=source, keep=square)


@dataclass
class Push:
    """The two ways to S^½ J u, of which ``keep`` takes what is wanted before the next are made."""

    target: Target
    divergence: Divergence
    directions: Directions
    keep: Callable[[Float[Tensor, "... k"]], Tensor]

    def backwards(self, examples: Sequence[Tensor], source: Source) -> Float[Tensor, "n v ..."]:
        """From the gradients of every output."""
        f = finite(self.target.outputs(examples).flatten(0, 1))
        y = source(examples, EachOutput()).inner(self.directions)
        return self.keep(self.divergence.root(f.unsqueeze(1), rearrange(y, "(n k) v -> n v k", k=f.shape[-1])))

    def forwards(self, examples: Sequence[Tensor]) -> Float[Tensor, "n v ..."]:
        """By Jacobian–vector products, of a few examples and directions at a time."""
        chosen = {name: p.detach() for name, p in self.target.chosen.items()}

        def along(tangent: dict[str, Tensor], some: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            result = torch.func.jvp(lambda values: self.target.call(some, values), (chosen,), (tangent,))
            return result[0], result[1]

        pieces, n = [], self.directions.n
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward derivative
            one = partial(self.target.outputs, tuple(tensor[:1] for tensor in examples))
            size, few = at_once(one, self.target.chosen, len(examples[0]), n, BUDGET)
            for some in chunks(tuple(examples), size):
                moved = []
                for start in range(0, n, few):
                    u = self.directions.select(range(start, min(start + few, n)))
                    tangents = {name: u.dense(name).view(-1, *p.shape) for name, p in chosen.items()}
                    f, y = torch.func.vmap(along, in_dims=(0, None))(tangents, some)
                    moved.append(self.keep(self.divergence.root(finite(f[0]), y)))  # all directions have the same f
                pieces.append(rearrange(torch.cat(moved), "v e p ... -> (e p) v ..."))
        return torch.cat(pieces)
