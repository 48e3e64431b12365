"""Circuits in superposition: ReLU(x W_in W_out + b) taught x ↦ xA through fewer hidden dimensions than inputs.

The circuit of an input writes to every output, so circuits share the parameters of W_out; what each computes is known,
its row of A. Chrisman, Bushnaq and Sharkey (2025), toy model of circuit superposition.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys import tms
from eigendecomp.targets.toys.stages import own_truth
from eigendecomp.targets.toys.training import explained, minimise


def coefficients(inputs: int, seed: int, largest: float = 3.0) -> Float[Tensor, "inputs inputs"]:
    """A, uniform in [0, largest]."""
    return largest * torch.rand(inputs, inputs, generator=torch.Generator().manual_seed(seed))


def data(n: int, inputs: int, generator: torch.Generator, *, active: float = 0.05) -> Float[Tensor, "n inputs"]:
    """Inputs each on with probability ``active``, then uniform in [0, 1]; no sample is empty."""
    return tms.data(n, inputs, generator, active=active, none_empty=True)


def train(
    inputs: int, hidden: int, *, seed: int, steps: int = 3000, learning_rate: float = 0.02
) -> tuple[tms.TMS, Float[Tensor, "inputs inputs"], float]:
    """A trained network, the A that it was taught, and the share of the outputs' variance that it explains."""
    a = coefficients(inputs, seed)
    model, share = taught(lambda n, draw: data(n, inputs, draw), a, hidden, seed, steps, learning_rate)
    return model, a, share


def taught(
    draw: Callable[[int, torch.Generator], Tensor],
    a: Float[Tensor, "inputs inputs"],
    hidden: int,
    seed: int,
    steps: int,
    learning_rate: float,
) -> tuple[tms.TMS, float]:
    """A network taught x ↦ xA on samples that ``draw`` gives, from Gaussian weights."""
    generator = torch.Generator().manual_seed(seed)
    model = tms.TMS(len(a), hidden, tied=False)
    assert model.W_out is not None
    with torch.no_grad():
        for weight in (model.W_in, model.W_out):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3, fused=True)

    def loss(_: int) -> Tensor:
        x = draw(512, generator)
        return (model(x) - x @ a).square().mean()

    minimise(loss, optimizer, steps)
    with torch.no_grad():
        x = draw(20_000, generator)
        return model.eval(), explained(model(x), x @ a)


def reach(model: tms.TMS) -> Float[Tensor, "inputs outputs"]:
    """What each input alone adds to the outputs, W_in W_out: as much of A as the hidden dimensions hold."""
    assert model.W_out is not None
    return (model.W_in @ model.W_out).detach()


def truth(model: tms.TMS) -> Truth:
    """For every input the parameter-space object that computes it.

    The gradient of half the squared length of what the input alone adds to the outputs, a = W_in[i] W_out:
    e_i ⊗ W_out a in W_in and W_in[i] ⊗ a in W_out. The outputs are open here.
    """
    return own_truth(model, torch.eye(len(model.W_in)).unsqueeze(1), reach(model).unsqueeze(1))
