"""Residual networks whose layers compute y = x + ReLU(x) together, with fewer neurons than features.

The networks of stochastic parameter decomposition (Bushnaq, Braun and Sharkey, 2025, arXiv:2506.20790):

    r_0 = x W_E,  r_{l+1} = r_l + W_out^l ReLU(W_in^l r_l),  y = r_L W_U,  W_U = W_Eᵀ,

no biases, W_E frozen. Every layer has less than the neurons that ReLU(x) takes, so that what is done for a feature
is spread over neurons and layers. With random rows of unit norm in W_E what these networks learn is disputed: W_E W_U
is not the identity, and undoing that is part of what they do (arXiv:2606.14673). With W_E = I there is no such part.

There being no biases, f(v x) = v f(x) for v > 0: what is said of a feature on alone holds for every positive value.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.study.recovery import Truth
from eigendecomp.targets.toys.training import minimise

Embedding = Literal["identity", "random"]


class Layer(nn.Module):
    """r ↦ r + W_out ReLU(W_in r)."""

    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.W_in = nn.Linear(width, neurons, bias=False)
        self.relu = nn.ReLU()
        self.W_out = nn.Linear(neurons, width, bias=False)

    def forward(self, r: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        return r + self.W_out(self.relu(self.W_in(r)))


class ResidMLP(nn.Module):
    """x ↦ y as above; ``neurons`` in each of ``layers`` layers, and ``width`` dimensions of the residual stream."""

    W_E: Float[Tensor, "features width"]

    def __init__(self, embedding: Float[Tensor, "features width"], neurons: int, layers: int) -> None:
        super().__init__()
        self.register_buffer("W_E", embedding)
        self.layers = nn.ModuleList(Layer(embedding.shape[1], neurons) for _ in range(layers))

    def forward(self, x: Float[Tensor, "n features"]) -> Float[Tensor, "n features"]:
        r = x @ self.W_E
        for layer in self.layers:
            r = layer(r)
        return r @ self.W_E.T

    @property
    def weights(self) -> list[tuple[str, Float[Tensor, "neurons width"], Float[Tensor, "width neurons"]]]:
        """Every layer's name, W_in and W_out."""
        parts = dict(self.named_parameters())
        names = [f"layers.{number}" for number in range(len(self.layers))]
        return [(name, parts[f"{name}.W_in.weight"].detach(), parts[f"{name}.W_out.weight"].detach()) for name in names]

    def computed(self, x: Float[Tensor, "n features"]) -> Float[Tensor, "n features"]:
        """What the layers add to the output: y − x W_E W_U. The network was trained to make it ReLU(x)."""
        return self(x) - x @ self.W_E @ self.W_E.T

    def contributions(
        self, parts: dict[str, Float[Tensor, "features *shape"]] | None = None
    ) -> Float[Tensor, "features neurons"]:
        """NC_j(i) = (W_U[i] W_out)_j (W_in W_E[i])_j, neurons of all layers side by side (SPD, section 4).

        Of the network's own weights, or of tensors given for each feature, such as those of its direction; a layer
        that is not among them contributes nothing.
        """
        layers = []
        for name, w_in, w_out in self.weights:
            if parts is None:
                reads, writes = self.W_E @ w_in.T, self.W_E @ w_out
            elif f"{name}.W_in.weight" in parts and f"{name}.W_out.weight" in parts:
                reads = torch.einsum("fnw,fw->fn", parts[f"{name}.W_in.weight"], self.W_E)
                writes = torch.einsum("fwn,fw->fn", parts[f"{name}.W_out.weight"], self.W_E)
            else:
                reads = writes = self.W_E.new_zeros(len(self.W_E), len(w_in))
            layers.append(reads * writes)
        return torch.cat(layers, 1)

    @torch.no_grad()
    def truth(self) -> Truth:
        """For every feature ∂y_i/∂w with the feature on alone, which is of rank one in every tensor.

        With r the stream, h = ReLU(W_in r) and g = ∂y_i/∂r after the layer, layer by layer:
        ∂y_i/∂W_in = (1[h > 0] ⊙ W_outᵀ g) ⊗ r and ∂y_i/∂W_out = g ⊗ h.
        """
        streams, hidden = [self.W_E], []
        for _, w_in, w_out in self.weights:
            hidden.append(torch.relu(streams[-1] @ w_in.T))
            streams.append(streams[-1] + hidden[-1] @ w_out.T)
        g, objects = self.W_E, {}
        for (name, w_in, w_out), r, h in reversed(list(zip(self.weights, streams, hidden, strict=False))):
            delta = (h > 0) * (g @ w_out)
            objects[f"{name}.W_in.weight"] = delta.unsqueeze(2) * r.unsqueeze(1)
            objects[f"{name}.W_out.weight"] = g.unsqueeze(2) * h.unsqueeze(1)
            g = g + delta @ w_in
        ordered = {name: objects[name] for name, _ in self.named_parameters()}
        layers = {name: (f"{name}.W_in.weight", f"{name}.W_out.weight") for name, *_ in self.weights}
        return Truth(torch.eye(len(self.W_E)), ordered, layers, self.contributions)


def data(
    n: int, features: int, generator: torch.Generator, *, active: float = 0.01, none_empty: bool = True
) -> Float[Tensor, "n features"]:
    """Samples whose features are each on with probability ``active``, then uniform in [−1, 1].

    With ``none_empty`` only samples with a feature on are returned: the others have neither output nor gradient.
    """
    size = int(n / (1 - (1 - active) ** features) * 1.1) + 100 if none_empty else n
    on = torch.rand(size, features, generator=generator) < active
    on = on[on.any(1)][:n] if none_empty else on
    return on * (2 * torch.rand(len(on), features, generator=generator) - 1)


def embedding(kind: Embedding, features: int, width: int, seed: int) -> Float[Tensor, "features width"]:
    """W_E: the identity, or random rows of unit norm.

    Raises:
        ValueError: for an identity that is not square, or another kind.
    """
    if kind not in ("identity", "random"):
        raise ValueError(f"embedding={kind!r} must be 'identity' or 'random'")
    if kind == "identity":
        if features != width:
            raise ValueError(f"an identity embedding needs as many dimensions as features; got {width} and {features}")
        return torch.eye(features)
    draw = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(features, width, generator=draw), dim=1)


def train(
    layers: int,
    kind: Embedding,
    *,
    seed: int,
    features: int = 100,
    width: int = 200,
    neurons: int = 50,
    steps: int = 1000,
    batch_size: int = 1024,
    learning_rate: float = 3e-3,
) -> tuple[ResidMLP, float]:
    """A trained network and the share of ReLU(x)'s squared size that it misses, on fresh data.

    ``neurons`` are those of each layer; ``width`` is not looked at with an identity embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    w_e = embedding(kind, features, features if kind == "identity" else width, seed)
    model = ResidMLP(w_e, neurons, layers)
    with torch.no_grad():
        for weight in model.parameters():  # the uniform default of nn.Linear, drawn from the seed
            weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) / weight.shape[1] ** 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)

    def loss(_: int) -> Tensor:
        x = data(batch_size, features, generator)
        return (model(x) - x - x.relu()).square().mean()

    minimise(loss, optimizer, steps)
    with torch.no_grad():
        x = data(20_000, features, generator)
        missed = (model(x) - x - x.relu()).square().sum() / x.relu().square().sum()
    return model.eval().requires_grad_(True), missed.item()
