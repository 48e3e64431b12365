"""Curvature: per-sample Hessians, and how far the output moves along directions, without forming a Hessian.

At the target's own parameters the divergence from its own output has no residual, so its Hessian is exactly
H(x) = Jᵀ S J (eq. 4), with S = 2I for a squared error and diag(p) − ppᵀ for a KL divergence over logits. Everything
below is read from R(x) = S^½ J, of which H = RᵀR: nothing here differentiates twice but the check that this is so.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence, OutputSum
from eigendecomp.support.examples import Inputs, as_examples, chunks
from eigendecomp.target import Target

LARGEST_DENSE = 4096  # parameters beyond which a dense Hessian is refused
BUDGET = 1 << 28  # bytes of tangents at a time
AT_ONCE = 200  # pairs of an example and a direction that are pushed at once

log = logging.getLogger(__name__)


class Source(Protocol):
    """Gives the gradients of examples, whose ``inner`` products with directions are read."""

    def __call__(self, examples: Sequence[Tensor], cotangents: Any) -> Any: ...


class EachUnit:
    """Cotangents that are one for one output and zero for the others: their gradients are J."""

    def __call__(self, f: Float[Tensor, "e p k"]) -> Float[Tensor, "e p k k"]:
        k = f.shape[-1]
        return torch.eye(k, dtype=f.dtype, device=f.device).expand(*f.shape[:2], k, k)

    def __getitem__(self, rows: slice) -> "EachUnit":
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Dense, for small models


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
    chosen = {name: p.detach() for name, p in target.chosen.items()}

    def f(values: dict[str, Tensor], *example: Tensor) -> Float[Tensor, "p k"]:
        return target.call([tensor.unsqueeze(0) for tensor in example], values)[0]

    alone = _rows(target, [tensor[:1] for tensor in examples])[1]
    try:
        rows = torch.func.vmap(torch.func.jacrev(f), in_dims=(None, *[0] * len(examples)))(chosen, *examples)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("torch.func.vmap cannot run this model, so examples are taken one by one: %s", error)
    else:
        e, p, k = rows[target.names[0]].shape[:3]
        j = torch.cat([part.reshape(e * p, k, -1) for part in rows.values()], -1)
        if (j[:p] - alone).norm() <= 1e-3 * alone.norm():  # torch batches some layers (cdist) wrongly, and says nothing
            return j
    return torch.cat([_rows(target, part)[1] for part in chunks(examples, 1)])


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
    if method != "autograd":
        raise ValueError(f"method={method!r} must be 'closed' or 'autograd'")
    if isinstance(divergence, OutputSum):
        raise ValueError(
            "OutputSum() is linear in the outputs and has no minimum; its curvature is that of SquaredError(), which "
            "method='closed' returns"
        )
    sizes = [p.numel() for p in target.chosen.values()]
    w0 = torch.cat([p.detach().flatten() for p in target.chosen.values()])
    reference = divergence.predict(target.outputs(examples))

    def d(w: Tensor, r: Float[Tensor, "p k"], *example: Tensor) -> Float[Tensor, " p"]:
        parts = zip(target.chosen.items(), w.split(sizes), strict=True)
        values = {name: part.view_as(p) for (name, p), part in parts}
        return divergence.value(target.call([tensor.unsqueeze(0) for tensor in example], values)[0], r)

    hessian = torch.func.vmap(torch.func.hessian(d), in_dims=(None, 0, *[0] * len(examples)))
    return hessian(w0, reference, *examples).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Along directions, for any model


def push_forward(
    target: Target,
    divergence: Divergence,
    directions: Directions,
    examples: Sequence[Tensor],
    *,
    budget: int = BUDGET,
    source: Source | None = None,
) -> Float[Tensor, "n v k"]:
    """S^½ J u of every sample and direction (eq. 5): forwards, or backwards through ``source`` where outputs are few.

    Its squared length is uᵀ H(x) u, and the inner product of two directions' is uᵀ H(x) u'. Differentiable in the
    directions. They are formed a few at a time: ``budget`` bounds the bytes in use, besides those of the result.
    """
    return _moved(target, divergence, directions, examples, budget, source, lambda moved: moved)


@torch.no_grad()
def curvatures(
    target: Target,
    divergence: Divergence,
    directions: Directions,
    examples: Sequence[Tensor],
    *,
    budget: int = BUDGET,
    source: Source | None = None,
) -> Float[Tensor, "n v"]:
    """uᵀ H(x) u of every sample and direction, without keeping S^½ J u, which is K times larger."""
    return _moved(target, divergence, directions, examples, budget, source, lambda moved: moved.square_().sum(-1))


def _moved(
    target: Target,
    divergence: Divergence,
    directions: Directions,
    examples: Sequence[Tensor],
    budget: int,
    source: Source | None,
    keep: Callable[[Float[Tensor, "... k"]], Tensor],
) -> Tensor:
    """``keep`` of S^½ J u, as samples × directions × what it keeps, by the cheaper of the two ways."""
    if source is not None:
        f = target.outputs(tuple(tensor[:1] for tensor in examples))
        if f.shape[1] * f.shape[2] <= directions.n:
            f = target.outputs(examples).flatten(0, 1)
            _check(f)
            y = source(examples, EachUnit()).inner(directions).unflatten(0, (-1, f.shape[-1])).mT
            return keep(divergence.root(f.unsqueeze(1), y))
    try:
        return _pushed(target, divergence, directions, examples, budget, keep)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("the model cannot be differentiated forwards, so each output is taken backwards: %s", error)
    rows = directions.flat(target.names)
    pieces = []
    for part in chunks(examples, 1):
        f, j = _rows(target, part)
        _check(f)
        pieces.append(keep(divergence.root(f.unsqueeze(1), (j @ rows.T).mT)))
    return torch.cat(pieces)


def _rows(target: Target, example: Sequence[Tensor]) -> tuple[Float[Tensor, "p k"], Float[Tensor, "p k w"]]:
    """The outputs of one example and J, by an ordinary backward pass for each of its outputs."""
    leaves = {name: p.detach().requires_grad_() for name, p in target.chosen.items()}
    with torch.enable_grad():
        f = target.call(example, leaves)[0]
        ones = f.flatten().unbind()
    grads = [torch.autograd.grad(one, list(leaves.values()), retain_graph=True, materialize_grads=True) for one in ones]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
    return f.detach(), j.view(*f.shape, -1)


def _pushed(
    target: Target,
    divergence: Divergence,
    directions: Directions,
    examples: Sequence[Tensor],
    budget: int,
    keep: Callable[[Float[Tensor, "... k"]], Tensor],
) -> Tensor:
    """``keep`` of S^½ J u by forward-mode Jacobian–vector products."""
    chosen = {name: p.detach() for name, p in target.chosen.items()}

    def along(tangent: dict[str, Tensor], part: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        result = torch.func.jvp(lambda values: target.call(part, values), (chosen,), (tangent,))
        return result[0], result[1]

    pieces = []
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward derivative
        size, few = split(target, examples, directions.n, budget)
        for part in chunks(examples, size):
            moved = []
            for start in range(0, directions.n, few):
                some = directions.select(range(start, min(start + few, directions.n)))
                tangents = {name: some.dense(name).view(-1, *p.shape) for name, p in chosen.items()}
                f, y = torch.func.vmap(along, in_dims=(0, None))(tangents, part)
                _check(f[0])
                moved.append(keep(divergence.root(f[0], y)))  # the outputs are the same for every direction
            pieces.append(torch.cat(moved).movedim(0, 2).flatten(0, 1))  # (v, e, p, …) → (n, v, …)
    return torch.cat(pieces)


def _check(f: Tensor) -> None:
    if not f.isfinite().all():
        raise ValueError("the model's output is not finite for some of the inputs; mend those examples")


def split(target: Target, examples: Sequence[Tensor], directions: int, budget: int) -> tuple[int, int]:
    """How many examples and how many directions to push forward at once: few examples and many directions.

    A direction needs about four arrays at a time of its own size and of the largest that the model makes.
    """
    with torch.no_grad(), Largest() as largest:
        target.outputs(tuple(tensor[:1] for tensor in examples))
    each = 4 * next(iter(target.chosen.values())).element_size()
    most = max(4, min(64, AT_ONCE // directions))
    size = min(most, len(examples[0]), max(1, budget // (2 * each * largest.numbers)))
    few = min(directions, AT_ONCE // size, budget // (each * (target.size + size * largest.numbers)))
    return size, max(1, few)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that is made inside."""

    numbers = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return out
