"""Per-sample gradients behind one interface, and the slow, obvious way to get them.

Whatever holds the gradients of a batch offers inner products with directions, squared norms and, for small problems,
the dense form. :class:`Gradients` is a sum of parts over disjoint tensors; :class:`Formed` is the part that holds the
numbers themselves. Samples are ordered example by example, position by position, draw by draw.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.directions import Directions, Shapes
from eigendecomp.target import Target

log = logging.getLogger(__name__)


class Cotangents(Protocol):
    """From the outputs of examples to the cotangents of their samples, r draws for each."""

    def __call__(self, f: Float[Tensor, "e p k"]) -> Float[Tensor, "e p r k"]: ...

    def __getitem__(self, rows: slice) -> "Cotangents":
        """The same for some of the examples."""
        ...


class Part(Protocol):
    """The gradients of some of the tensors, for n samples."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def inner(self, directions: Directions) -> Float[Tensor, "n v"]:
        """⟨g, u⟩ over these tensors; differentiable in the directions."""
        ...

    def square_norms(self) -> Float[Tensor, " n"]:
        """‖g‖² over these tensors."""
        ...

    def dense(self) -> dict[str, Float[Tensor, "n *shape"]]:
        """The gradients, formed."""
        ...

    def sample(self, n: int) -> "Part":
        """The gradient of one sample alone."""
        ...

    def weighted(self, weights: Float[Tensor, " n"]) -> dict[str, Float[Tensor, "*shape"]]:
        """Σ_n weight_n g_n."""
        ...


class Formed:
    """Gradients as numbers, flattened tensor after tensor."""

    def __init__(self, shapes: Shapes, values: Float[Tensor, "n w"]) -> None:
        self.shapes = dict(shapes)
        self.names = tuple(shapes)
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def inner(self, directions: Directions) -> Tensor:
        return self.values @ directions.flat(self.names).T

    def square_norms(self) -> Tensor:
        return self.values.square().sum(-1)

    def dense(self) -> dict[str, Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        parts = self.values.split(sizes, 1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def sample(self, n: int) -> "Formed":
        return Formed(self.shapes, self.values[n : n + 1])

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        total = Formed(self.shapes, (weights @ self.values)[None])
        return {name: value[0] for name, value in total.dense().items()}


class Gradients:
    """The gradients of n samples over all chosen tensors."""

    def __init__(self, shapes: Shapes, parts: Sequence[Part]) -> None:
        self.shapes = dict(shapes)
        self.parts = list(parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def inner(self, directions: Directions) -> Float[Tensor, "n v"]:
        """⟨g_n, u_v⟩; differentiable in the directions."""
        return sum_of([part.inner(directions) for part in self.parts])

    def inner_and_gram(
        self, encoder: Directions, decoder: Directions
    ) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n v"], Float[Tensor, "v v"]]:
        """⟨g, u⟩ for the encoder and for the decoder, and the decoder's Gram matrix, doing nothing twice."""
        tied = encoder is decoder
        if len(self.parts) == 1 and isinstance(self.parts[0], Formed):  # then so are the directions
            rows = decoder.flat(self.parts[0].names)
            y = self.parts[0].values @ rows.T
            return y if tied else self.inner(encoder), y, rows @ rows.T
        if not tied and any(isinstance(part, Recomputed) for part in self.parts):  # one pass over the pieces
            z, y = self.inner(encoder.beside(decoder)).split((encoder.n, decoder.n), 1)
        else:
            y = self.inner(decoder)
            z = y if tied else self.inner(encoder)
        return z, y, decoder.gram()

    def square_norms(self) -> Float[Tensor, " n"]:
        """‖g_n‖²."""
        return sum_of([part.square_norms() for part in self.parts])

    def weighted(self, weights: Float[Tensor, " n"]) -> dict[str, Float[Tensor, "*shape"]]:
        """Σ_n weight_n g_n, tensor by tensor."""
        return {name: value for part in self.parts for name, value in part.weighted(weights).items()}

    def dense(self) -> dict[str, Float[Tensor, "n *shape"]]:
        """{parameter: (n, *shape)}: small problems only."""
        formed = {name: value for part in self.parts for name, value in part.dense().items()}
        return {name: formed[name] for name in self.shapes}

    def flat(self) -> Float[Tensor, "n w"]:
        """The gradients as rows: small problems only."""
        return torch.cat([value.flatten(1) for value in self.dense().values()], 1)


class Recomputed:
    """Gradients that are too large to keep: made piece by piece, and again in the backward pass."""

    def __init__(self, names: Sequence[str], pieces: Sequence[Callable[[], Gradients]]) -> None:
        self.names = tuple(names)
        self.pieces = pieces
        self.norms: list[Tensor] = []

    def __len__(self) -> int:
        return sum(len(piece()) for piece in self.pieces)

    def inner(self, directions: Directions) -> Tensor:
        return _InnerByPieces.apply(self, directions, *directions.tensors())

    def square_norms(self) -> Tensor:
        return torch.cat(self.norms or [piece().square_norms() for piece in self.pieces])

    def dense(self) -> dict[str, Tensor]:
        pieces = [piece().dense() for piece in self.pieces]
        return {name: torch.cat([dense[name] for dense in pieces]) for name in self.names}

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for piece in self.pieces:
            g = piece()
            own, weights = weights[: len(g)], weights[len(g) :]
            totals = {name: totals.get(name, 0) + value for name, value in g.weighted(own).items()}
        return totals

    def sample(self, n: int) -> Formed:
        g = {name: value[n : n + 1] for name, value in self.dense().items()}
        shapes = {name: tuple(value.shape[1:]) for name, value in g.items()}
        return Formed(shapes, torch.cat([value.flatten(1) for value in g.values()], 1))


class _InnerByPieces(torch.autograd.Function):
    """⟨g, u⟩ of all pieces, of which none is kept."""

    @staticmethod
    def forward(ctx: Any, gradients: Recomputed, directions: Directions, *factors: Tensor) -> Tensor:
        ctx.gradients, ctx.directions = gradients, directions
        ctx.save_for_backward(*factors)
        rows, norms = [], []
        for piece in gradients.pieces:
            g = piece()
            rows.append(g.inner(directions))
            norms.append(g.square_norms())
        gradients.norms, ctx.sizes = norms, [len(row) for row in rows]
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [factor.detach().requires_grad_() for factor in ctx.saved_tensors]
        copies = iter(leaves)
        directions = ctx.directions.map(lambda _: next(copies))
        totals = [torch.zeros_like(leaf) for leaf in leaves]
        for piece, part in zip(ctx.gradients.pieces, grad[0].split(ctx.sizes), strict=True):
            with torch.enable_grad():
                z = piece().inner(directions)
            for total, g in zip(totals, torch.autograd.grad(z, leaves, part, materialize_grads=True), strict=True):
                total += g
        return None, None, *totals


class Source(Protocol):
    """Gives the gradients of examples."""

    target: Target

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients: ...


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, without the integer zero that ``sum`` starts from."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class EachOutput:
    """Cotangents that are one for one output and zero for the others: their gradients are J."""

    def __call__(self, f: Tensor) -> Tensor:
        k = f.shape[-1]
        return torch.eye(k, dtype=f.dtype, device=f.device).expand(*f.shape[:2], k, k)

    def __getitem__(self, rows: slice) -> "EachOutput":
        return self


class FunctionalSource:
    """The oracle: ``torch.func.vmap`` of a vector–Jacobian product, one example at a time, every gradient formed.

    With ``loop`` each example and cotangent is an ordinary backward pass of its own: slower still, and turned to of
    itself for the few operations (an LSTM's) that vmap does not know.
    """

    def __init__(
        self, target: Target, names: Sequence[str] | None = None, *, loop: bool = False, chunk: int | None = None
    ) -> None:
        self.target = target
        self.names = list(target.names if names is None else names)
        self.loop, self.chunk = loop, chunk

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients:
        with torch.no_grad():
            c = spread(cotangents(self.target.call(examples)))
        shapes = {name: self.target.shapes[name] for name in self.names}
        return Gradients(shapes, [Formed(shapes, self.pull_back(examples, c))])

    def pull_back(self, examples: Sequence[Tensor], c: Float[Tensor, "e c p k"]) -> Float[Tensor, "ec w"]:
        """g = Jᵀc for every cotangent of every example, flattened (eq. 3)."""
        chosen = {name: self.target.chosen[name].detach() for name in self.names}
        rest = {name: p.detach() for name, p in self.target.chosen.items() if name not in chosen}

        def call(values: dict[str, Tensor], example: Sequence[Tensor]) -> Float[Tensor, "p k"]:
            return self.target.call([tensor.unsqueeze(0) for tensor in example], {**rest, **values})[0]

        def one(c: Float[Tensor, "c p k"], *example: Tensor) -> dict[str, Tensor]:
            vjp = torch.func.vjp(lambda values: call(values, example), chosen)[1]
            return torch.func.vmap(lambda cotangent: vjp(cotangent)[0])(c)

        if not self.loop:
            try:
                formed = torch.func.vmap(one, chunk_size=self.chunk)(c, *examples)
                sizes = {name: p.numel() for name, p in chosen.items()}  # which vmap gets wrong for PReLU
                return torch.cat([g.reshape(c.shape[0] * c.shape[1], sizes[name]) for name, g in formed.items()], 1)
            except RuntimeError as error:
                log.warning("torch.func.vmap cannot run this model, so examples are taken one by one: %s", error)
                self.loop = True
        leaves = {name: value.requires_grad_() for name, value in chosen.items()}
        rows = []
        for i in range(len(c)):
            with torch.enable_grad():
                f = call(leaves, [tensor[i] for tensor in examples])
            for row in c[i]:
                g = torch.autograd.grad(f, list(leaves.values()), row, retain_graph=True, materialize_grads=True)
                rows.append(torch.cat([part.flatten() for part in g]))
        return torch.stack(rows)


def spread(c: Float[Tensor, "e p r k"]) -> Float[Tensor, "e pr p k"]:
    """Cotangents of whole outputs: a sample's is zero at every position but its own."""
    if c.shape[1] == 1:
        return c.movedim(1, 2)
    own = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    return (own[:, None, :, None] * c.unsqueeze(3)).flatten(1, 2)
