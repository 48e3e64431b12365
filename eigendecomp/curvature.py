"""Curvature: per-sample Hessians, and how far the output moves along directions, without forming a Hessian.

At the target's own parameters the divergence from its own output has no residual, so its Hessian is exactly
H(x) = Jᵀ S J (eq. 4), with S = 2I for a squared error and diag(p) − ppᵀ for a KL divergence over logits.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence
from eigendecomp.target import Inputs, Target, as_examples, chunks

LARGEST_DENSE = 4096  # parameters beyond which a dense Hessian is refused


def jacobian(target: Target, examples: Sequence[Tensor]) -> Float[Tensor, "n k w"]:
    """∂f/∂w of every sample, formed; small models only."""
    chosen = {name: p.detach() for name, p in target.chosen.items()}

    def f(values: dict[str, Tensor], *example: Tensor) -> Float[Tensor, "p k"]:
        return target.call([tensor.unsqueeze(0) for tensor in example], values)[0]

    rows = torch.func.vmap(torch.func.jacrev(f), in_dims=(None, *[0] * len(examples)))(chosen, *examples)
    return torch.cat([part.flatten(0, 1).flatten(2) for part in rows.values()], -1)


def per_sample_hessian(
    model: nn.Module, x: Inputs, divergence: Divergence, *, parameters: Sequence[str] = ("*",), method: str = "closed"
) -> Float[Tensor, "n w w"]:
    """H(x) = ∇²_w D(f(x, w), f(x, w₀)) at w₀ for every sample, dense; small models only.

    Args:
        method: ``"closed"`` for JᵀSJ, ``"autograd"`` for the second derivative taken twice through the model.

    Raises:
        ValueError: if more than ``LARGEST_DENSE`` parameters are chosen, or the method is unknown.
    """
    target, examples = Target(model, parameters), as_examples(x)
    if target.size > LARGEST_DENSE:
        raise ValueError(
            f"a dense Hessian over {target.size} parameters is too large; choose at most {LARGEST_DENSE} with "
            "parameters=[...], or use activation(), which never forms it"
        )
    if method == "closed":
        j = jacobian(target, examples)
        f = target.outputs(examples).flatten(0, 1)
        root = divergence.root(f.unsqueeze(1), j.mT)  # S^½ acts on the outputs, the last axis here
        return root @ root.mT
    if method != "autograd":
        raise ValueError(f"method={method!r} must be 'closed' or 'autograd'")
    sizes = [p.numel() for p in target.chosen.values()]
    w0 = torch.cat([p.detach().flatten() for p in target.chosen.values()])
    reference = divergence.predict(target.outputs(examples))

    def d(w: Tensor, r: Float[Tensor, "p k"], *example: Tensor) -> Float[Tensor, " p"]:
        parts = zip(target.chosen.items(), w.split(sizes), strict=True)
        values = {name: part.view_as(p) for (name, p), part in parts}
        return divergence.value(target.call([tensor.unsqueeze(0) for tensor in example], values)[0], r)

    hessian = torch.func.vmap(torch.func.hessian(d), in_dims=(None, 0, *[0] * len(examples)))
    return hessian(w0, reference, *examples).flatten(0, 1)


def push_forward(
    target: Target,
    divergence: Divergence,
    directions: Directions,
    examples: Sequence[Tensor],
    *,
    budget: int = 1 << 28,
) -> Float[Tensor, "n v k"]:
    """S^½ J u of every sample and direction, by forward-mode Jacobian–vector products (eq. 5).

    Its squared length is uᵀ H(x) u, and the inner product of two directions' is uᵀ H(x) u'. Directions are formed a
    few at a time: ``budget`` bounds their bytes.
    """
    chosen = {name: p.detach() for name, p in target.chosen.items()}
    step = max(1, budget // (target.size * target.chosen[target.names[0]].element_size() * 4))

    def along(tangent: dict[str, Tensor], part: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda values: target.call(part, values), (chosen,), (tangent,))

    pieces = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward derivative
        for part in chunks(examples, 64):
            moved = []
            for start in range(0, directions.n, step):
                few = directions.select(range(start, min(start + step, directions.n)))
                tangents = {name: few.dense(name).view(-1, *p.shape) for name, p in chosen.items()}
                f, y = torch.func.vmap(along, in_dims=(0, None), out_dims=(None, 0))(tangents, part)
                moved.append(divergence.root(f, y))
            pieces.append(torch.cat(moved).movedim(0, 2).flatten(0, 1))  # (v, e, p, k) → (n, v, k)
    return torch.cat(pieces)
