"""An induction circuit: two layers of attention, a head each, taught sequences that repeat and follow bigrams.

A sequence repeats a block over and over. Inside the block a token is followed by its successor with probability one
half, and else by any token. So a token seen for the first time says what its bigram says, and one seen before says what
came after it last time. The first needs no head. The second needs two: a head that copies the previous token to each
position, and one that looks for the present token among those copies (Olsson et al., 2022, arXiv:2209.11895).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys.training import minimise

VOCABULARY, LENGTH = 24, 24
PERIODS = (6, 11)  # the shortest and the longest block
FEATURES = ("induction", "bigrams")


class Head(nn.Module):
    """A causal attention head that writes to the residual stream."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.W_Q = nn.Linear(width, size, bias=False)
        self.W_K = nn.Linear(width, size, bias=False)
        self.W_V = nn.Linear(width, size, bias=False)
        self.W_O = nn.Linear(size, width, bias=False)

    def pattern(self, r: Float[Tensor, "n t width"]) -> Float[Tensor, "n t t"]:
        """How much each position (rows) attends to each earlier one and itself (columns)."""
        scores = self.W_Q(r) @ self.W_K(r).mT / self.W_Q.out_features**0.5
        later = torch.ones(r.shape[1], r.shape[1], dtype=torch.bool, device=r.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1)

    def forward(self, r: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        return r + self.W_O(self.pattern(r) @ self.W_V(r))


class Induction(nn.Module):
    """Tokens ↦ logits of the next token: embeddings of tokens and positions, two heads in turn, an unembedding."""

    def __init__(self, width: int = 48, size: int = 24) -> None:
        super().__init__()
        self.W_E = nn.Embedding(VOCABULARY, width)
        self.W_P = nn.Parameter(torch.zeros(LENGTH, width))
        self.heads = nn.ModuleList(Head(width, size) for _ in range(2))
        self.W_U = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t vocabulary"]:
        r = self.W_E(tokens) + self.W_P[: tokens.shape[1]]
        for head in self.heads:
            r = head(r)
        return self.W_U(r)

    @torch.no_grad()
    def patterns(self, tokens: Int[Tensor, "n t"]) -> list[Float[Tensor, "n t t"]]:
        """The attention pattern of each head."""
        r, patterns = self.W_E(tokens) + self.W_P[: tokens.shape[1]], []
        for head in self.heads:
            assert isinstance(head, Head)
            patterns.append(head.pattern(r))
            r = head(r)
        return patterns


class Sequences(NamedTuple):
    """Tokens, one more than a network reads, and the length of the block that each sequence repeats."""

    tokens: Int[Tensor, "n t1"]
    period: Int[Tensor, " n"]

    @property
    def inputs(self) -> Int[Tensor, "n t"]:
        """What the network reads."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Int[Tensor, "n t"]:
        """What comes next."""
        return self.tokens[:, 1:]

    def samples(self) -> dict[str, Bool[Tensor, "n t"]]:
        """By feature, the positions that need it.

        Induction: the token stood at one earlier place of the block alone, and what came after it is not its successor.
        Bigrams: the token has not been seen before in the sequence.
        """
        x, t = self.inputs, torch.arange(self.inputs.shape[1])
        same = x.unsqueeze(2) == x.unsqueeze(1)
        before = (same & (t.unsqueeze(1) > t)).sum(2)
        inside = (same & (t < self.period.view(-1, 1, 1))).sum(2)
        repeated = (t >= self.period.unsqueeze(1)) & (inside == 1)
        return {"induction": repeated & (self.targets != successor(x)), "bigrams": before == 0}

    def wanted(self) -> dict[str, Int[Tensor, "n t"]]:
        """By feature, the token that it says comes next, which counts at the feature's samples alone."""
        return {"induction": self.targets, "bigrams": successor(self.inputs)}


def successor(tokens: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """The token that a bigram puts next."""
    return (tokens + 1) % VOCABULARY


def data(n: int, generator: torch.Generator) -> Sequences:
    """Sequences that repeat a block whose tokens follow their bigram half of the time, and else are any."""
    period = torch.randint(PERIODS[0], PERIODS[1] + 1, (n,), generator=generator)
    free = torch.randint(VOCABULARY, (n, PERIODS[1]), generator=generator)
    follow = torch.rand(n, PERIODS[1], generator=generator) < 0.5
    block = [free[:, 0]]
    for t in range(1, PERIODS[1]):
        block.append(torch.where(follow[:, t], successor(block[-1]), free[:, t]))
    return Sequences(torch.stack(block, 1).gather(1, torch.arange(LENGTH + 1) % period.unsqueeze(1)), period)


def train(
    *, seed: int, steps: int = 2000, batch_size: int = 64, learning_rate: float = 5e-3, width: int = 48, size: int = 24
) -> tuple[Induction, dict[str, float]]:
    """A trained network, and by feature the mean probability of the token that the feature says, on fresh data."""
    generator = torch.Generator().manual_seed(seed)
    model = Induction(width=width, size=size)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.5 if name in ("W_E.weight", "W_P") else weight.shape[1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)

    def loss(_: int) -> Tensor:
        batch = data(batch_size, generator)
        return F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())

    minimise(loss, optimizer, steps)
    return model.eval(), said(model, data(2000, generator))


@torch.no_grad()
def said(model: nn.Module, sequences: Sequences) -> dict[str, float]:
    """By feature, the mean probability of the token that it says, over its samples."""
    p = model(sequences.inputs).softmax(-1)
    wanted, samples = sequences.wanted(), sequences.samples()
    return {k: p.gather(2, wanted[k].unsqueeze(2))[..., 0][samples[k]].mean().item() for k in FEATURES}


HEADS = {f"head {n + 1}": tuple(f"heads.{n}.W_{letter}.weight" for letter in "QKVO") for n in range(2)}


def truth(model: Induction, sequences: Sequences) -> Truth:
    """For each feature what computes it in either head, in the samples that need it.

    The gradient of the logit of the token that the feature says, over the mean logit, averaged over its samples.
    """
    wanted, samples = sequences.wanted(), sequences.samples()
    named = dict(model.named_parameters())
    weights = {name: named[name] for names in HEADS.values() for name in names}
    f = model(sequences.inputs)
    over = {k: f.gather(2, wanted[k].unsqueeze(2))[..., 0] - f.mean(2) for k in FEATURES}
    gradients = [
        torch.autograd.grad(over[k][samples[k]].mean(), list(weights.values()), retain_graph=True) for k in FEATURES
    ]
    objects = {name: torch.stack(parts) for name, *parts in zip(weights, *gradients, strict=True)}
    shown = torch.stack([samples[k].flatten() for k in FEATURES])
    return Truth(sequences.inputs, objects, HEADS, samples=shown)
