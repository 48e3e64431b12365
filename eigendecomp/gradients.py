"""Per-sample gradients behind one interface, and the slow, obvious way to get them.

Whatever holds the gradients of a batch offers inner products with directions, squared norms and, for small problems,
the dense form. :class:`Gradients` is a sum of parts over disjoint tensors; :class:`Formed` is the part that holds the
numbers themselves. Samples are ordered example by example, position by position, draw by draw.
"""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from eigendecomp.directions import OPS_PER_ELEMENT, Directions
from eigendecomp.support.algebra import sum_of
from eigendecomp.support.axes import Shapes, named
from eigendecomp.target import Target

log = logging.getLogger(__name__)

OWN = 8  # how much longer the same operations take in many small products than in one large one: measured


class Cotangents(Protocol):
    """From the outputs of examples to the cotangents of their samples, r draws for each."""

    def __call__(self, f: Float[Tensor, "e p k"]) -> Float[Tensor, "e p r k"]: ...

    def __getitem__(self, examples: slice) -> "Cotangents":
        """The same for some of the examples."""
        ...


class EachOutput(Cotangents):
    """Cotangents that are one for one output and zero for the others: their gradients are J."""

    def __call__(self, f: Tensor) -> Tensor:
        k = f.shape[-1]
        return torch.eye(k, dtype=f.dtype, device=f.device).expand(*f.shape[:2], k, k)

    def __getitem__(self, examples: slice) -> "EachOutput":
        return self


class Products(NamedTuple):
    """What the objective needs to know of n gradients and all v directions."""

    z: Float[Tensor, "n v"]  # ⟨g, u⟩ with the encoder
    y: Float[Tensor, "n v"]  # ⟨g, u⟩ with the decoder
    gram: Float[Tensor, "v v"]  # of the decoder
    squares: Float[Tensor, " n"]  # ‖g‖²


class Part(Protocol):
    """The gradients of some of the tensors, for n samples: as in :class:`Gradients`, over these tensors alone.

    ``inner_own`` takes m directions for each sample: first those of the first sample. Operations are counted for v or m
    directions of a kind, and are infinite where a way is no choice.
    """

    names: tuple[str, ...]

    def __len__(self) -> int: ...
    def inner(self, directions: Directions) -> Float[Tensor, "n v"]: ...
    def inner_own(self, own: Directions) -> Float[Tensor, "n m"]: ...
    def square_norms(self) -> Float[Tensor, " n"]: ...
    def operations(self, directions: Directions, v: float) -> float: ...
    def operations_own(self, directions: Directions, m: float) -> float: ...
    def dense(self) -> dict[str, Float[Tensor, "n *shape"]]: ...
    def weighted(self, weights: Float[Tensor, " n"]) -> dict[str, Float[Tensor, "*shape"]]: ...

    def sample(self, n: int) -> "Part":
        """The gradient of one sample alone."""
        ...

    def products(self, encoder: Directions, decoder: Directions) -> Products:
        """All that the objective needs, over these tensors, with nothing computed twice."""
        y = self.inner(decoder)
        z = y if encoder is decoder else self.inner(encoder)
        return Products(z, y, decoder.gram(names=self.names), self.square_norms())


class Formed(Part):
    """Gradients as numbers, flattened tensor after tensor."""

    def __init__(self, shapes: Shapes, values: Float[Tensor, "n w"]) -> None:
        self.shapes, self.names, self.values = dict(shapes), tuple(shapes), values

    def __len__(self) -> int:
        return len(self.values)

    def inner(self, directions: Directions) -> Tensor:
        return self.values @ directions.flat(self.names).T

    def inner_own(self, own: Directions) -> Tensor:
        products, n = [], len(self.values)
        for name, g in self.dense().items():
            axes = own.tensor[name].first
            left, right = (rearrange(side, "(n m) k d -> n (m k) d", n=n) for side in own.pair(name, axes))
            rest = [axis for axis in range(g.ndim - 1) if axis not in axes]
            g = rearrange(g, f"n {named(range(g.ndim - 1))} -> n ({named(axes)}) ({named(rest)})")
            terms = ((g @ right.mT).mT * left).sum(2)
            products.append(terms.unflatten(1, (own.n // n, -1)).sum(2))
        return sum_of(products)

    def square_norms(self) -> Tensor:
        return self.values.square().sum(-1)

    def products(self, encoder: Directions, decoder: Directions) -> Products:
        u = decoder.flat(self.names)
        y = self.values @ u.T
        z = y if encoder is decoder else self.inner(encoder)
        # The directions are formed already; of more directions than samples the factors give the Gram matrix sooner.
        gram = u @ u.T if decoder.n <= len(y) else decoder.gram(names=self.names)
        return Products(z, y, gram, self.square_norms())

    def operations(self, directions: Directions, v: float) -> float:
        n, w = self.values.shape
        return v * (2 * n * w + OPS_PER_ELEMENT * (n + w))

    def operations_own(self, directions: Directions, m: float) -> float:
        each = (
            directions.tensor[name].terms * (2 * OWN * math.prod(shape) + 2 * OPS_PER_ELEMENT * sum(shape))
            for name, shape in self.shapes.items()
        )
        return len(self.values) * m * sum(each)

    def dense(self) -> dict[str, Tensor]:
        flat = self.values.split([math.prod(shape) for shape in self.shapes.values()], 1)
        return {name: g.unflatten(1, shape) for (name, shape), g in zip(self.shapes.items(), flat, strict=True)}

    def sample(self, n: int) -> "Formed":
        return Formed(self.shapes, self.values[n : n + 1])

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        total = Formed(self.shapes, (weights @ self.values)[None])
        return {name: value[0] for name, value in total.dense().items()}


class Gradients:
    """The gradients of n samples over all chosen tensors: each method is the sum over parts of :class:`Part`'s."""

    def __init__(self, shapes: Shapes, parts: Sequence[Part]) -> None:
        self.shapes, self.parts = dict(shapes), list(parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def inner(self, directions: Directions) -> Float[Tensor, "n v"]:
        """⟨g_n, u_v⟩; differentiable in the directions."""
        return sum_of([part.inner(directions) for part in self.parts])

    def inner_own(self, own: Directions) -> Float[Tensor, "n m"]:
        """⟨g_n, u_nm⟩ with m directions for each sample: first those of the first sample; differentiable in them."""
        return sum_of([part.inner_own(own) for part in self.parts])

    def products(self, encoder: Directions, decoder: Directions) -> Products:
        """⟨g, u⟩ for encoder and decoder, the decoder's Gram matrix, and ‖g‖²: in one pass over the gradients."""
        each = [part.products(encoder, decoder) for part in self.parts]
        return Products(*(sum_of(terms) for terms in zip(*each, strict=True)))

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
        """The gradients over the flattened tensors, in order: small problems only."""
        return torch.cat([value.flatten(1) for value in self.dense().values()], 1)


class Source(Protocol):
    """Gives the gradients of examples."""

    target: Target

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients: ...


class FunctionalSource:
    """The oracle: ``torch.func.vmap`` of a vector–Jacobian product, one example at a time, every gradient formed.

    With ``loop`` each example and cotangent is an ordinary backward pass of its own: slower still, and turned to of
    itself for the few operations (an LSTM's) that vmap does not know. ``names`` are the parameters, all if not given.
    """

    def __init__(self, target: Target, names: Sequence[str] | None = None, *, loop: bool = False) -> None:
        self.target, self.loop = target, loop
        self.names = list(target.names if names is None else names)

    def __call__(self, examples: Sequence[Tensor], cotangents: Cotangents) -> Gradients:
        with torch.no_grad():
            c = at_own_position(cotangents(self.target.call(examples)))
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
                formed = torch.func.vmap(one)(c, *examples)
                sizes = {name: p.numel() for name, p in chosen.items()}  # which vmap gets wrong for PReLU
                return torch.cat([g.reshape(c.shape[0] * c.shape[1], sizes[name]) for name, g in formed.items()], 1)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.warning("torch.func.vmap cannot run this model, so examples are taken one by one: %s", error)
                self.loop = True
        leaves = {name: value.requires_grad_() for name, value in chosen.items()}
        gradients = []
        for i in range(len(c)):
            with torch.enable_grad():
                f = call(leaves, [tensor[i] for tensor in examples])
            for row in c[i]:
                g = torch.autograd.grad(f, list(leaves.values()), row, retain_graph=True, materialize_grads=True)
                gradients.append(torch.cat([value.flatten() for value in g]))
        return torch.stack(gradients)


def at_own_position(c: Float[Tensor, "e p r k"]) -> Float[Tensor, "e pr p k"]:
    """Cotangents of samples as cotangents of whole outputs, which are zero at every position but the sample's own."""
    if c.shape[1] == 1:
        return rearrange(c, "e 1 r k -> e r 1 k")
    own = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    return rearrange(own[:, None, :, None] * c.unsqueeze(3), "e p r q k -> e (p r) q k")
