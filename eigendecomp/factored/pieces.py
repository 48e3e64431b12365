"""Gradients of a batch in pieces: of some examples, captured twice a step; or of some positions, each of own length."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from eigendecomp.directions import Directions
from eigendecomp.gradients import Formed, Gradients, Part, Products, sum_of


class Recomputed(Part):
    """Gradients that are too large to keep: made piece by piece, and again in the backward pass."""

    def __init__(self, names: Sequence[str], pieces: Sequence[Callable[[], Gradients]]) -> None:
        self.names = tuple(names)
        self.pieces = pieces
        self.squares: list[Tensor] = []  # ‖g‖² of every piece, once one has been made

    def __len__(self) -> int:
        return len(self.square_norms())

    def inner(self, directions: Directions) -> Tensor:
        return _InnerByPieces.apply(self, directions, *directions.tensors())

    def inner_own(self, own: Directions) -> Tensor:
        m, start, products = own.n // len(self), 0, []
        for piece in self.pieces:
            g = piece()
            products.append(g.inner_own(own.select(range(start, start + m * len(g)))))
            start += m * len(g)
        return torch.cat(products)

    def square_norms(self) -> Tensor:
        self.squares = self.squares or [piece().square_norms() for piece in self.pieces]
        return torch.cat(self.squares)

    def products(self, encoder: Directions, decoder: Directions) -> Products:
        if encoder is decoder:
            z = y = self.inner(decoder)
        else:
            z, y = self.inner(encoder.beside(decoder)).split((encoder.n, decoder.n), 1)
        return Products(z, y, decoder.gram(names=self.names), self.square_norms())

    def operations(self, directions: Directions, v: float) -> float:
        return 0.0  # beside making the gradients

    def operations_own(self, directions: Directions, m: float) -> float:
        return math.inf  # they would be made once more

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


class ByPosition(Part):
    """Gradients that are held in pieces, each of the same examples' samples at a range of positions."""

    def __init__(self, pieces: Sequence[Part], examples: int) -> None:
        self.names, self.pieces, self.examples = pieces[0].names, pieces, examples
        self.sizes = [len(piece) // examples for piece in pieces]  # samples of an example

    def __len__(self) -> int:
        return self.examples * sum(self.sizes)

    def joined(self, values: Iterable[Tensor]) -> Tensor:
        """Rows for all samples, from those of every piece."""
        return torch.cat([rows.unflatten(0, (self.examples, -1)) for rows in values], 1).flatten(0, 1)

    def split(self, values: Tensor) -> list[Tensor]:
        """Rows of every piece's samples, from those of all."""
        return [rows.flatten(0, 1) for rows in values.unflatten(0, (self.examples, -1)).split(self.sizes, 1)]

    def inner(self, directions: Directions) -> Tensor:
        return self.joined(piece.inner(directions) for piece in self.pieces)

    def inner_own(self, own: Directions) -> Tensor:
        numbers = torch.arange(own.n).unflatten(0, (len(self), -1))
        pairs = zip(self.pieces, self.split(numbers), strict=True)
        return self.joined(piece.inner_own(own.select(index.flatten())) for piece, index in pairs)

    def square_norms(self) -> Tensor:
        return self.joined(piece.square_norms() for piece in self.pieces)

    def operations(self, directions: Directions, v: float) -> float:
        return sum(piece.operations(directions, v) for piece in self.pieces)

    def operations_own(self, directions: Directions, m: float) -> float:
        return sum(piece.operations_own(directions, m) for piece in self.pieces)

    def dense(self) -> dict[str, Tensor]:
        pieces = [piece.dense() for piece in self.pieces]
        return {name: self.joined(dense[name] for dense in pieces) for name in self.names}

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        pieces = [piece.weighted(own) for piece, own in zip(self.pieces, self.split(weights), strict=True)]
        return {name: sum_of([total[name] for total in pieces]) for name in self.names}

    def sample(self, n: int) -> Part:
        e, position = divmod(n, sum(self.sizes))
        for piece, size in zip(self.pieces, self.sizes, strict=True):
            if position < size:
                return piece.sample(e * size + position)
            position -= size
        raise IndexError(n)


def by_position(pieces: Sequence[Gradients], examples: int) -> Gradients:
    """The gradients of all samples in order, from those at ranges of positions."""
    parts: list[Part] = []
    for same in zip(*(piece.parts for piece in pieces), strict=True):
        part = ByPosition(same, examples)
        formed = [piece for piece in same if isinstance(piece, Formed)]  # numbers, which take as much in every piece
        parts.append(Formed(formed[0].shapes, part.joined(piece.values for piece in formed)) if formed else part)
    return Gradients(pieces[0].shapes, parts)


class _InnerByPieces(torch.autograd.Function):
    """⟨g, u⟩ of all pieces, of which none is kept; leaves their squared norms with the gradients."""

    @staticmethod
    def forward(ctx: Any, gradients: Recomputed, directions: Directions, *factors: Tensor) -> Tensor:
        ctx.gradients, ctx.directions = gradients, directions
        ctx.save_for_backward(*factors)
        products, squares = [], []
        for piece in gradients.pieces:
            g = piece()
            products.append(g.inner(directions))
            squares.append(g.square_norms())
        gradients.squares, ctx.sizes = squares, [len(product) for product in products]
        return torch.cat(products)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [factor.detach().requires_grad_() for factor in ctx.saved_tensors]
        copies = iter(leaves)
        directions = ctx.directions.map(lambda _: next(copies))
        totals = [torch.zeros_like(leaf) for leaf in leaves]
        for piece, cotangent in zip(ctx.gradients.pieces, grad[0].split(ctx.sizes), strict=True):
            with torch.enable_grad():
                z = piece().inner(directions)
            for total, g in zip(totals, torch.autograd.grad(z, leaves, cotangent, materialize_grads=True), strict=True):
                total += g
        return None, None, *totals
