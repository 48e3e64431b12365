"""Small models that several tests take apart."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset


class Model(nn.Module):
    """A model from parts and a function of them, in evaluation mode."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.function = forward
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Heads(nn.Module):
    """One layer of attention with a weight for every head, and an output for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.W_K, self.W_V = nn.Parameter(torch.randn(3, 5, 2)), nn.Parameter(torch.randn(3, 5, 2))
        self.W_O = nn.Parameter(torch.randn(3, 2, 5))
        self.out = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (torch.einsum("bpd,hde->bhpe", x, w) for w in (self.W_K, self.W_V))
        mask = torch.ones(x.shape[1], x.shape[1]).tril() == 0
        z = ((k @ k.mT).masked_fill(mask, -torch.inf).softmax(-1) @ v).movedim(1, 2)
        return self.out(torch.tanh(x + torch.einsum("bphe,hed->bpd", z, self.W_O)))


class LanguageModel(nn.Module):
    """Tokens (n, p) to outputs (n, p, 7): a table, a map, a sum over positions, a normalisation, one last map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.out = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.tanh(self.mix(self.embed(x)).cumsum(1))))


class ConvNet(nn.Module):
    """Images to three numbers; the kernel is used at so many places that its gradient is smaller than its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.convolution(x).relu().mean((2, 3)))


class Stream(IterableDataset):
    """A dataset of unknown length."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x)


class Chosen:
    """Cotangents chosen beforehand, (examples, positions, draws, outputs)."""

    def __init__(self, c: Tensor) -> None:
        self.c = c

    def __call__(self, f: Tensor) -> Tensor:
        return self.c

    def __getitem__(self, examples: slice) -> "Chosen":
        return Chosen(self.c[examples])


def assert_same(results: Sequence[Tensor], expected: Sequence[Tensor], exact: float) -> None:
    """Every result is the one expected, up to a share of its size."""
    assert len(results) == len(expected)
    for a, b in zip(results, expected, strict=True):
        assert (a - b).norm() <= exact * (1 + b.norm())
