"""Squares: a network of several layers taught x ↦ x², one output an input, with inputs of both signs.

Nothing in it is linear, and a feature's computation is spread over every layer. Chrisman, Bushnaq and Sharkey (2025),
complex loss landscape.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.study.chains import Stage, run
from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys import tms
from eigendecomp.targets.toys.stages import own_truth
from eigendecomp.targets.toys.training import explained, minimise


class Squares(nn.Module):
    """x ↦ GELU(… GELU(x W_0 + b_0) …) W_L + b_L, with ``layers`` hidden layers."""

    def __init__(self, features: int, width: int, layers: int) -> None:
        super().__init__()
        sizes = [features, *[width] * layers, features]
        self.layers = layers
        for number, (i, o) in enumerate(pairwise(sizes)):
            setattr(self, f"W_{number}", nn.Parameter(torch.zeros(i, o)))
            setattr(self, f"b_{number}", nn.Parameter(torch.zeros(o)))

    def stages(self) -> list[Stage]:
        """The weights in the order in which they are used."""
        return [
            Stage(f"W_{n}", getattr(self, f"W_{n}"), getattr(self, f"b_{n}"), F.gelu if n < self.layers else None)
            for n in range(self.layers + 1)
        ]

    def forward(self, x: Float[Tensor, "n features"]) -> Float[Tensor, "n features"]:
        return run(self.stages(), x)


def data(n: int, features: int, generator: torch.Generator, *, active: float = 0.05) -> Float[Tensor, "n features"]:
    """Features each on with probability ``active``, then uniform in [−1, 1]; no sample is empty."""
    x = tms.data(n, features, generator, active=active, none_empty=True)
    return x * (2 * (torch.rand(x.shape, generator=generator) < 0.5) - 1)


def alone(features: int, value: float = 1.0) -> Float[Tensor, "features 2 features"]:
    """Each feature on alone, at ``value`` and at −``value``."""
    return value * torch.stack([torch.eye(features), -torch.eye(features)], 1)


def train(
    features: int, width: int, layers: int, *, seed: int, steps: int = 6000, learning_rate: float = 3e-3
) -> tuple[Squares, float]:
    """A trained network and the share of the outputs' variance that it explains on fresh data."""
    generator = torch.Generator().manual_seed(seed)
    model = Squares(features, width, layers)
    with torch.no_grad():
        for stage in model.stages():
            i = stage.weight.shape[0]
            stage.weight.copy_(torch.randn(stage.weight.shape, generator=generator) * (2 / i) ** 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3, fused=True)

    def loss(_: int) -> Tensor:
        x = data(512, features, generator)
        return (model(x) - x.square()).square().sum(-1).mean()

    minimise(loss, optimizer, steps)
    with torch.no_grad():
        x = data(20_000, features, generator)
        return model.eval(), explained(model(x), x.square())


def truth(model: Squares, value: float = 0.75) -> Truth:
    """For every feature the parameter-space object that computes it.

    The gradient of the feature's own output, on alone, summed over ±``value``: the two may use different units.
    """
    features = len(model.stages()[0].weight)
    return own_truth(model, alone(features, value), torch.eye(features).unsqueeze(1).expand(-1, 2, -1))
