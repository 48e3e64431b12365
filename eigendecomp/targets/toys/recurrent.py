"""A recurrent network with known states: a gated recurrent unit that keeps three bits (the flip-flop task).

Each of three channels is written now and then, with +1 or −1, and its output says what was written last (Sussillo and
Barak, 2013). What is to be kept is known at every step: bit by bit, the last value written.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys.training import minimise

BITS, LENGTH, UNITS = 3, 12, 16


class FlipFlop(nn.Module):
    """Writes (n, t, bits) ↦ bits kept (n, t, bits): h ↦ (1 − z) h + z n, gates and candidate of write and state.

    z = σ(W_xz x + W_hz h), r = σ(W_xr x + W_hr h), n = tanh(W_xn x + r ⊙ W_hn h), with biases at the writes' side.
    """

    def __init__(self, bits: int = BITS, units: int = UNITS) -> None:
        super().__init__()
        self.units = units
        self.write_z, self.state_z = nn.Linear(bits, units), nn.Linear(units, units, bias=False)
        self.write_r, self.state_r = nn.Linear(bits, units), nn.Linear(units, units, bias=False)
        self.write_n, self.state_n = nn.Linear(bits, units), nn.Linear(units, units, bias=False)
        self.read = nn.Linear(units, bits)

    def states(self, x: Float[Tensor, "n t bits"]) -> Float[Tensor, "n t units"]:
        """The state after every step; it starts at zero."""
        h, states = x.new_zeros(len(x), self.units), []
        for t in range(x.shape[1]):
            z = torch.sigmoid(self.write_z(x[:, t]) + self.state_z(h))
            r = torch.sigmoid(self.write_r(x[:, t]) + self.state_r(h))
            n = torch.tanh(self.write_n(x[:, t]) + r * self.state_n(h))
            h = (1 - z) * h + z * n
            states.append(h)
        return torch.stack(states, 1)

    def forward(self, x: Float[Tensor, "n t bits"]) -> Float[Tensor, "n t bits"]:
        return self.read(self.states(x))


def data(
    n: int, generator: torch.Generator, *, bits: int = BITS, length: int = LENGTH, written: float = 0.2
) -> Float[Tensor, "n t bits"]:
    """Channels each written with probability ``written`` at every step, +1 or −1 alike."""
    x = 2.0 * (torch.rand(n, length, bits, generator=generator) < 0.5) - 1
    return x * (torch.rand(x.shape, generator=generator) < written)


def memory(x: Float[Tensor, "n t bits"]) -> Float[Tensor, "n t bits"]:
    """The value written last to each bit; zero before the first."""
    kept, values = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        kept = torch.where(x[:, t] != 0, x[:, t], kept)
        values.append(kept)
    return torch.stack(values, 1)


def alone(bits: int = BITS, length: int = LENGTH) -> Float[Tensor, "bits 2 t bits"]:
    """Each bit written alone, at the first step, with +1 and with −1."""
    x = torch.zeros(bits, 2, length, bits)
    for bit in range(bits):
        x[bit, :, 0, bit] = torch.tensor([1.0, -1.0])
    return x


def train(
    *, seed: int, steps: int = 1500, batch_size: int = 128, learning_rate: float = 1e-2, units: int = UNITS
) -> tuple[FlipFlop, float]:
    """A trained network, and the share of the bits' squared size that it misses on fresh data."""
    generator = torch.Generator().manual_seed(seed)
    model = FlipFlop(units=units)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.0 if name.endswith("bias") else weight.shape[-1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3, fused=True)

    def loss(_: int) -> Tensor:
        x = data(batch_size, generator)
        return (model(x) - memory(x)).square().mean()

    minimise(loss, optimizer, steps)
    with torch.no_grad():
        x = data(2000, generator)
        kept = memory(x)
        return model.eval(), ((model(x) - kept).square().sum() / kept.square().sum()).item()


def truth(model: FlipFlop) -> Truth:
    """For every bit what keeps it, in the weights of writes and of states, at every step at which it is kept alone.

    The gradient of the bit's own output times the value written, over all steps of sequences that write this bit alone,
    once with +1 and once with −1.
    """
    bits = model.read.out_features
    x = alone(bits).to(model.read.weight.dtype)
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("read")}
    gradients = []
    for bit in range(bits):
        kept = model(x[bit])[..., bit] * memory(x[bit])[..., bit]
        gradients.append(torch.autograd.grad(kept.sum(), list(weights.values())))
    objects = {name: torch.stack(parts) for name, *parts in zip(weights, *gradients, strict=True)}
    layers = {
        side: tuple(f"{side}_{gate}.weight" for gate in "nzr") + tuple(
            name for name in weights if name.startswith(side) and name.endswith("bias")
        )
        for side in ("write", "state")
    }  # fmt: skip
    shown = torch.eye(bits, dtype=torch.bool).repeat_interleave(x[0, ..., 0].numel(), 1)
    return Truth(x.flatten(0, 1), objects, layers, samples=shown)
