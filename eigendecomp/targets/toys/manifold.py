"""Circles in superposition: every feature is an angle with a radius, and the network doubles the angle.

A circle lies in a plane of the input space, is on in few samples, and (r cos θ, r sin θ) there has to become
(r cos 2θ, r sin 2θ) in two outputs of its own. All planes pass through one layer of fewer dimensions than they have
together. A circle is no direction of any layer: what a sample does with it is a point on a closed curve. Other tasks
on the same circles (``TASKS``) have gradients of other dimensions.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.targets.toys.training import explained, minimise


class Circles(nn.Module):
    """x ↦ out(GELU(hidden(embed(x)))), where ``embed`` is linear and narrow: the circles share its dimensions."""

    def __init__(self, inputs: int, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width, bias=False)
        self.hidden = nn.Linear(width, hidden)
        self.gelu = nn.GELU()
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        return self.out(self.gelu(self.hidden(self.embed(x))))


def planes(circles: int, inputs: int, seed: int) -> Float[Tensor, "circles 2 inputs"]:
    """Two orthonormal rows for each circle, at random, orthogonal to the other circles'."""
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(inputs, 2 * circles, generator=draw)).Q.T.unflatten(0, (circles, 2))


def point(angle: Tensor, radius: Tensor | float = 1.0) -> Float[Tensor, "... 2"]:
    """The point of a plane at an angle."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


# What a circle's own outputs are to be, from its angle and its radius, zero where it is off.
TASKS: dict[str, Callable[[Tensor, Tensor], Float[Tensor, "... k"]]] = {
    "coordinate": lambda angle, radius: (radius * angle.cos()).unsqueeze(-1),
    "radius": lambda angle, radius: radius.unsqueeze(-1),
    "copy": lambda angle, radius: point(angle, radius),
    "double": lambda angle, radius: point(2 * angle, radius),
    "triple": lambda angle, radius: point(3 * angle, radius),
}


def data(
    n: int,
    planes: Float[Tensor, "circles 2 inputs"],
    generator: torch.Generator,
    *,
    active: float = 0.1,
    none_empty: bool = False,
    task: str = "double",
) -> tuple[Float[Tensor, "n inputs"], Float[Tensor, "n outputs"]]:
    """Inputs and the outputs wanted; each circle is on with probability ``active``, its radius in [0.5, 1].

    With ``none_empty`` only samples with a circle on are returned.
    """
    circles = len(planes)
    size = int(n / (1 - (1 - active) ** circles) * 1.1) + 100 if none_empty else n
    on = torch.rand(size, circles, generator=generator) < active
    angle = 2 * math.pi * torch.rand(size, circles, generator=generator)
    radius = on * (0.5 + 0.5 * torch.rand(size, circles, generator=generator))
    if none_empty:
        angle, radius = angle[on.any(1)][:n], radius[on.any(1)][:n]
    return torch.einsum("ncp,cpi->ni", point(angle, radius), planes), TASKS[task](angle, radius).flatten(1)


def alone(n: int, planes: Float[Tensor, "circles 2 inputs"], seed: int) -> Float[Tensor, "n inputs"]:
    """Inputs with exactly one circle on."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data(8 * n, planes, generator, none_empty=True, active=0.05)
    return x[(y.unflatten(1, (len(planes), 2)).norm(dim=-1) > 0).sum(1) == 1][:n]


def around(
    planes: Float[Tensor, "circles 2 inputs"], points: int
) -> tuple[Float[Tensor, " points"], Float[Tensor, "circles points inputs"]]:
    """Angles, and the inputs of each circle on alone at them, with radius 0.75."""
    angle = 2 * math.pi * torch.arange(points) / points
    return angle, torch.einsum("np,cpi->cni", point(angle, 0.75), planes)


def train(
    planes: Float[Tensor, "circles 2 inputs"],
    width: int,
    hidden: int,
    *,
    seed: int,
    steps: int = 5000,
    task: str = "double",
) -> tuple[Circles, float, float]:
    """A trained network, its squared error on fresh data and the share of the outputs' variance it explains.

    The embedded planes are held at one length, or a few would be stretched and the sizes of the circles' gradients
    would differ by an order of magnitude.
    """
    inputs, generator = planes.shape[-1], torch.Generator().manual_seed(seed)
    model = Circles(inputs, width, hidden, data(1, planes, torch.Generator(), task=task)[1].shape[1])
    weights = (model.embed.weight, model.hidden.weight, model.out.weight)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
        for bias in (model.hidden.bias, model.out.bias):
            bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3, fused=True)

    def loss(_: int) -> Tensor:
        x, y = data(512, planes, generator, task=task)
        return (model(x) - y).square().sum(-1).mean()

    minimise(loss, optimizer, steps, lambda: weights[0].copy_(same_length(weights[0], planes)))
    with torch.no_grad():
        x, y = data(20_000, planes, generator, task=task)
        f = model(x)
        return model.eval(), (f - y).square().sum().item() / len(x), explained(f, y)


def same_length(
    embed: Float[Tensor, "width inputs"], planes: Float[Tensor, "circles 2 inputs"]
) -> Float[Tensor, "width inputs"]:
    """The embedding with every plane's image scaled to norm √2, and nothing outside the planes."""
    image = torch.einsum("wi,cpi->cwp", embed, planes)
    return torch.einsum("cwp,cpi->wi", image * 2**0.5 / image.norm(dim=(1, 2), keepdim=True), planes)
