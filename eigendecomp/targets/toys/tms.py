"""The toy model of superposition: more sparse features than hidden dimensions, ReLU(W_outᵀ W_in x + b)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.study.chains import Stage, run
from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys.stages import own_truth
from eigendecomp.targets.toys.training import minimise


class TMS(nn.Module):
    """x ↦ ReLU(x W_in W_out + b). Tied, W_out is W_inᵀ: one parameter used twice, as in the draft.

    With ``identity`` there is a matrix H between the two, the identity, as in the networks of the published peers.
    """

    def __init__(self, features: int, hidden: int, tied: bool, identity: bool = False) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.zeros(features, hidden))
        self.W_out = None if tied else nn.Parameter(torch.zeros(hidden, features))
        self.b = nn.Parameter(torch.zeros(features))
        self.H = nn.Parameter(torch.eye(hidden)) if identity else None

    def stages(self) -> list[Stage]:
        """The weights in the order in which they are used."""
        middle = [] if self.H is None else [Stage("H", self.H)]
        w_out = self.W_in.T if self.W_out is None else self.W_out
        return [Stage("W_in", self.W_in), *middle, Stage("W_out", w_out, self.b, torch.relu)]

    def forward(self, x: Float[Tensor, "n features"]) -> Float[Tensor, "n features"]:
        return run(self.stages(), x)


def untie(model: TMS) -> TMS:
    """The same network with W_out as a parameter of its own."""
    made = TMS(*model.W_in.shape, tied=False)
    assert made.W_out is not None
    with torch.no_grad():
        made.W_in.copy_(model.W_in)
        made.W_out.copy_(model.W_in.T if model.W_out is None else model.W_out)
        made.b.copy_(model.b)
    return made


def with_identity(model: TMS) -> TMS:
    """The same function with the identity as a matrix of its own between W_in and W_out."""
    made = TMS(*model.W_in.shape, tied=model.W_out is None, identity=True)
    made.load_state_dict(model.state_dict(), strict=False)
    return made


def truth(model: TMS) -> Truth:
    """For every feature the parameter-space object that computes it.

    It is the gradient of half the square of the feature's own output before the ReLU, without the bias, for the
    feature on alone at 1. In each matrix it has rank one: e_i ⊗ W_out[:, i] in W_in, W_in[i] ⊗ e_i in W_out, and
    W_in[i] ⊗ W_out[:, i] in H, which no split of the weights themselves would give.
    """
    eye = one_hot(len(model.W_in))
    with torch.no_grad():
        reach = run([stage._replace(bias=None, act=None) for stage in model.stages()], eye).diagonal()
    return own_truth(model, eye.unsqueeze(1), torch.diag(reach).unsqueeze(1))


def data(
    n: int, features: int, generator: torch.Generator, *, active: float = 0.05, none_empty: bool = False
) -> Float[Tensor, "n features"]:
    """Samples whose features are each on with probability ``active``, then uniform in [0, 1].

    With ``none_empty`` only samples with a feature on are returned: the others carry no information on directions.
    """
    size = int(n / (1 - (1 - active) ** features) * 1.1) + 100 if none_empty else n
    x = torch.rand(size, features, generator=generator)
    x = x * (torch.rand(size, features, generator=generator) < active)
    return x[x.any(1)][:n] if none_empty else x


def one_hot(features: int, value: float = 1.0) -> Float[Tensor, "features features"]:
    """Each feature on alone."""
    return value * torch.eye(features)


def train(
    features: int,
    hidden: int,
    *,
    tied: bool,
    seed: int,
    steps: int = 4000,
    learning_rate: float = 0.005,
    weight_decay: float = 0.5,
    instances: int = 24,
) -> tuple[TMS, float]:
    """Train several copies at once and return the one with the lowest loss on fresh data, with that loss.

    Most starts end in a local minimum that leaves a feature out; the copies differ in their starting weights alone.
    Two untied matrices drift apart (one grows as the other shrinks); ``weight_decay`` holds them in balance.
    """
    generator = torch.Generator().manual_seed(seed)
    w_in = torch.randn(instances, features, hidden, generator=generator) / hidden**0.5
    w_out = w_in.mT.clone()
    b = torch.zeros(instances, 1, features)
    weights = [tensor.requires_grad_() for tensor in ([w_in, b] if tied else [w_in, w_out, b])]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0 if tied else weight_decay, fused=True)

    def losses(x: Tensor) -> Float[Tensor, " instances"]:
        y = torch.relu(x @ w_in @ (w_in.mT if tied else w_out) + b)
        return (y - x).square().sum(-1).mean(-1)

    minimise(lambda _: losses(data(512, features, generator)).sum(), optimizer, steps)
    with torch.no_grad():
        held_out = losses(data(20_000, features, generator))
        best = int(held_out.argmin())
        model = TMS(features, hidden, tied)
        model.W_in.copy_(w_in[best])
        if model.W_out is not None:
            model.W_out.copy_(w_out[best])
        model.b.copy_(b[best, 0])
    return model, held_out[best].item()
