"""Stochastic parameter decomposition (Bushnaq, Braun and Sharkey, 2025, arXiv:2506.20790), from its formulas.

Every weight W of a chain is written as a sum of C rank-one components, W ≈ Σ_c V_c ⊗ U_c. A small network for each
component reads how strongly it is met on a sample, x·V_c, and says how important it is there, g in [0, 1]. The outputs
must stay as they were under every mask m = g + (1 − g) r with r uniform in [0, 1], while g is made small.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.study.chains import Stage, run

LEAK = 0.01  # slope of the hard sigmoids where they are flat
Masks = Mapping[str, Float[Tensor, "n c"]]


class _LowerLeaky(torch.autograd.Function):
    """The identity cut to [0, 1]; below 0 a small slope lets it rise, and only rise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x <= 0, LEAK * grad[0].clamp_max(0), torch.where(x <= 1, grad[0], 0.0))


def lower_leaky(x: Tensor) -> Tensor:
    """The hard sigmoid that masks are made from."""
    out = _LowerLeaky.apply(x)
    assert isinstance(out, Tensor)
    return out


def upper_leaky(x: Tensor) -> Tensor:
    """The hard sigmoid that is made small: above 1 it rises on with a small slope."""
    return torch.where(x > 1, 1 + LEAK * (x - 1), x.clamp(0, 1))


def stochastic_mask(g: Float[Tensor, "n c"], r: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """m = g + (1 − g) r."""
    return g + (1 - g) * r


def minimality(g: Mapping[str, Float[Tensor, "n c"]], p: float) -> Float[Tensor, ""]:
    """The mean over samples of Σ g^p over all components."""
    total = [values.abs().pow(p).sum(-1).mean() for values in g.values()]
    return torch.stack(total).sum()


class Components(nn.Module):
    """The C components of one weight, and the gates that judge them."""

    def __init__(self, weight: Float[Tensor, "i o"], count: int, hidden: int, draw: torch.Generator) -> None:
        super().__init__()
        i, o = weight.shape

        def gauss(*size: int, fan: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=draw) / fan**0.5)

        self.V, self.U = gauss(i, count, fan=i), gauss(count, o, fan=count)
        self.w1, self.b1 = gauss(count, hidden, fan=1), nn.Parameter(torch.zeros(count, hidden))
        self.w2, self.b2 = gauss(count, hidden, fan=hidden), nn.Parameter(torch.zeros(count))

    def gates(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n c"]:
        """What the hard sigmoids are given."""
        inner = (x @ self.V).unsqueeze(-1)
        return (F.gelu(inner * self.w1 + self.b1) * self.w2).sum(-1) + self.b2

    def dense(self) -> Float[Tensor, "c i o"]:
        """Every component as a matrix."""
        return torch.einsum("ic,co->cio", self.V, self.U)


class SPD(nn.Module):
    """A chain of weights, each with components."""

    def __init__(self, stages: Sequence[Stage], count: int, *, hidden: int = 16, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        own = [s._replace(weight=s.weight.detach(), bias=None if s.bias is None else s.bias.detach()) for s in stages]
        self.stages: list[Stage] = own
        parts = {s.name: Components(s.weight, count, hidden, draw) for s in own}
        self.parts: nn.ModuleDict = nn.ModuleDict(parts)

    def of(self, name: str) -> Components:
        """The components of one weight."""
        components = self.parts[name]
        assert isinstance(components, Components)
        return components

    def run(self, x: Float[Tensor, "n i"], masks: Masks) -> Float[Tensor, "n o"]:
        """The output with masked components in the place of the weights that ``masks`` names."""

        def product(stage: Stage, x: Tensor) -> Tensor:
            if stage.name not in masks:
                return x @ stage.weight
            components = self.of(stage.name)
            return ((x @ components.V) * masks[stage.name]) @ components.U

        return run(self.stages, x, product)

    def gates(self, x: Float[Tensor, "n i"]) -> dict[str, Float[Tensor, "n c"]]:
        """What every weight's gates say of the inputs that it meets in the target itself."""
        gates: dict[str, Tensor] = {}

        def product(stage: Stage, x: Tensor) -> Tensor:
            gates[stage.name] = self.of(stage.name).gates(x)
            return x @ stage.weight

        run(self.stages, x, product)
        return gates

    @torch.no_grad()
    def importance(self, x: Float[Tensor, "n i"]) -> dict[str, Float[Tensor, "n c"]]:
        """Causal importances in [0, 1]."""
        return {name: values.clamp(0, 1) for name, values in self.gates(x).items()}

    def components(self) -> dict[str, Float[Tensor, "c i o"]]:
        """{weight: (components, *shape)}."""
        return {name: self.of(name).dense().detach() for name in self.parts}

    def faithfulness(self) -> Float[Tensor, ""]:
        """Σ (W − Σ_c V_c ⊗ U_c)² over the number of weights."""
        left = [(s.weight - self.of(s.name).V @ self.of(s.name).U).square().sum() for s in self.stages]
        return torch.stack(left).sum() / sum(s.weight.numel() for s in self.stages)

    def reconstruction(
        self, x: Float[Tensor, "n i"], y: Float[Tensor, "n o"], masks: Masks
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean squared error of the outputs with all weights masked, and the mean of those with one masked alone."""
        together = (self.run(x, masks) - y).square().mean()
        if len(masks) == 1:
            return together, together
        layers = [(self.run(x, {name: mask}) - y).square().mean() for name, mask in masks.items()]
        return together, torch.stack(layers).mean()


@dataclass(frozen=True)
class Settings:
    """What decides a run, as the paper gives it for toy models."""

    count: int = 20  # components a weight
    minimality: float = 3e-3  # weight of the minimality loss
    p: float = 1.0
    steps: int = 10_000
    batch_size: int = 4096
    learning_rate: float = 1e-3
    layerwise: float = 1.0
    hidden: int = 16  # units of a gate


@dataclass
class Run:
    """A trained decomposition, with what happened on the way."""

    spd: SPD
    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def loss(spd: SPD, x: Tensor, y: Tensor, settings: Settings, draw: torch.Generator) -> Float[Tensor, ""]:
    """Faithfulness, stochastic reconstruction of all and of single weights, and minimality."""
    gates = spd.gates(x)
    masks = {
        name: stochastic_mask(lower_leaky(values), torch.rand(values.shape, generator=draw))
        for name, values in gates.items()
    }
    together, layers = spd.reconstruction(x, y, masks)
    sparse = minimality({name: upper_leaky(values) for name, values in gates.items()}, settings.p)
    return spd.faithfulness() + together + settings.layerwise * layers + settings.minimality * sparse


@torch.enable_grad()
def train(
    stages: Sequence[Stage],
    samples: Callable[[int, torch.Generator], Float[Tensor, "n i"]],
    settings: Settings,
    *,
    seed: int,
    watch: Callable[[SPD], dict[str, float]] | None = None,
    stop: Callable[[dict[str, float]], bool] | None = None,
    every: int = 250,
    seconds: float = float("inf"),
) -> Run:
    """Learn components; ``samples(n, generator)`` draws inputs.

    Every ``every`` steps ``watch`` scores them, outside the clock, and ``stop`` may end the run; so does ``seconds`` of
    the processor. The learning rate falls as a cosine over all ``settings.steps``, reached or not.
    """
    draw = torch.Generator().manual_seed(seed)
    spd = SPD(stages, settings.count, hidden=settings.hidden, seed=seed)
    optimizer = torch.optim.Adam(spd.parameters(), lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    done = Run(spd)
    clock = time.process_time()
    for step in range(1, settings.steps + 1):
        x = samples(settings.batch_size, draw)
        with torch.no_grad():
            y = spd.run(x, {})
        optimizer.zero_grad()
        value = loss(spd, x, y, settings, draw)
        value.backward()
        optimizer.step()
        schedule.step()
        done.steps = step
        if step % every == 0 or step == settings.steps:
            done.seconds += time.process_time() - clock
            row = {"step": step, "seconds": done.seconds, "loss": value.item()} | (watch(spd) if watch else {})
            done.history.append(row)
            if done.seconds > seconds or (stop is not None and stop(row)):
                break
            clock = time.process_time()
    return done
