"""Gradients of a batch that is too large to hold: captured piece by piece, twice a step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eigendecomp.directions import Directions
from eigendecomp.gradients import Formed, Gradients, Part, Products


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
        per_sample = own.n // len(self)
        start, products = 0, []
        for piece in self.pieces:
            g = piece()
            stop = start + len(g) * per_sample
            products.append(g.inner_own(own.select(range(start, stop))))
            start = stop
        return torch.cat(products)

    def square_norms(self) -> Tensor:
        self.squares = self.squares or [piece().square_norms() for piece in self.pieces]
        return torch.cat(self.squares)

    def products(self, encoder: Directions, decoder: Directions) -> Products:
        if encoder is decoder:
            z = y = self.inner(decoder)
        else:
            z, y = self.inner(encoder.beside(decoder)).split((encoder.n, decoder.n), 1)
        return Products(z, y, decoder.over(self.names).gram(), self.square_norms())

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
