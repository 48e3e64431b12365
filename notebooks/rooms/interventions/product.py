"""Features that interact in known pairs: an output for each pair, in which their product counts, one for each other.

The wiring makes the truth known: every output has hidden units of its own, in an order drawn at random, which read
the features that the output needs and no others. Two features act on each other if and only if they are a pair.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.targets.toys.training import explained, minimise

Pairs = tuple[tuple[int, int], ...]


class Products(nn.Module):
    """x ↦ out(GELU(hidden(x)))."""

    def __init__(self, features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.gelu = nn.GELU()
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Float[Tensor, "n features"]) -> Float[Tensor, "n outputs"]:
        return self.out(self.gelu(self.hidden(x)))


def circuits(features: int, pairs: Pairs) -> list[tuple[int, ...]]:
    """The features that each output needs: the pairs, then the features in none."""
    paired = {feature for pair in pairs for feature in pair}
    return [*pairs, *((feature,) for feature in range(features) if feature not in paired)]


def interacting(owner: Tensor, pairs: Pairs) -> Tensor:
    """Which directions are owned by the two features of a pair, as (v, v)."""
    known = torch.zeros(int(owner.max()) + 1, int(owner.max()) + 1, dtype=torch.bool)
    for a, b in pairs:
        if max(a, b) < len(known):
            known[a, b] = known[b, a] = True
    return known[owner][:, owner]


def data(
    n: int, features: int, pairs: Pairs, generator: torch.Generator, *, active: float = 0.15, sums: Pairs = ()
) -> tuple[Float[Tensor, "n features"], Float[Tensor, "n outputs"]]:
    """Features on with probability ``active``, then uniform in [0, 1], and a + b + 2ab or a as the outputs wanted.

    ``sums`` are pairs that share an output without a product, a + b: controls. No sample is empty.
    """
    size = int(n / (1 - (1 - active) ** features) * 1.1) + 100
    x = torch.rand(size, features, generator=generator) * (torch.rand(size, features, generator=generator) < active)
    x = x[x.any(1)][:n]
    parts = [x[:, list(needed)] for needed in circuits(features, pairs + sums)]
    products = [2 * own.prod(1) if i < len(pairs) else 0 for i, own in enumerate(parts)]
    return x, torch.stack([own.sum(1) + product for own, product in zip(parts, products, strict=True)], 1)


def wiring(
    features: int, units: int, pairs: Pairs, seed: int
) -> tuple[Float[Tensor, "hidden features"], Float[Tensor, "outputs hidden"]]:
    """Which weights there are, as ones and zeros, with ``units`` hidden units for each output."""
    needed = circuits(features, pairs)
    reads, writes = torch.zeros(len(needed), features), torch.eye(len(needed))
    for number, circuit in enumerate(needed):
        reads[number, list(circuit)] = 1
    order = torch.randperm(units * len(needed), generator=torch.Generator().manual_seed(seed))
    return reads.repeat_interleave(units, 0)[order], writes.repeat_interleave(units, 0)[order].T


def train(
    features: int, units: int, pairs: Pairs, *, seed: int, steps: int = 2000, sums: Pairs = ()
) -> tuple[Products, float]:
    """A trained network and the share of the outputs' variance that it explains on fresh data."""
    generator = torch.Generator().manual_seed(seed)
    masks = wiring(features, units, pairs + sums, seed)
    model = Products(features, len(masks[0]), len(masks[1]))
    weights = (model.hidden.weight, model.out.weight)
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            weight.copy_(mask * torch.randn(weight.shape, generator=generator) / mask.sum(1, keepdim=True) ** 0.5)
        for bias in (model.hidden.bias, model.out.bias):
            bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)

    def loss(_: int) -> Tensor:
        x, y = data(512, features, pairs, generator, sums=sums)
        return (model(x) - y).square().sum(-1).mean()

    def keep_wiring() -> None:
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)

    minimise(loss, optimizer, steps, keep_wiring)
    with torch.no_grad():
        x, y = data(20_000, features, pairs, generator, sums=sums)
        return model.eval(), explained(model(x), y)
