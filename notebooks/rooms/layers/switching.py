"""A feature of a residual network switched off: along its direction, and by all that acts at one site."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigendecomp.decomposition import Decomposition
from eigendecomp.study import autoencoders, recovery
from eigendecomp.study.autoencoders import Autoencoder
from eigendecomp.study.moves import Move, along
from eigendecomp.targets.toys import resid_mlp
from eigendecomp.targets.toys.resid_mlp import ResidMLP
from rooms import switches

Site = tuple[Autoencoder, Float[Tensor, "features units"]]  # and how active its units are on each feature alone
Try = tuple[Move, float, bool]  # a move, its largest step, and whether steps go both ways


def hidden(model: ResidMLP, layer: int, x: Float[Tensor, "n features"]) -> Float[Tensor, "n neurons"]:
    """A layer's activations after the ReLU."""
    caught: list[Tensor] = []
    relu = model.get_submodule(f"layers.{layer}.relu")
    handle = relu.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return caught[0]


def sites(
    model: ResidMLP, x: Float[Tensor, "n features"], units: int, kept: list[float], *, seed: int, steps: int
) -> dict[tuple[int, float], Site]:
    """By layer and number of kept units, an autoencoder of the layer's activations."""
    made, alone = {}, torch.eye(len(model.W_E))
    for layer in range(len(model.layers)):
        inputs = hidden(model, layer, x)
        for k in kept:
            sae = autoencoders.train(inputs, units, k, seed=seed, steps=steps, batch_size=512)
            made[layer, k] = sae, sae.encode(hidden(model, layer, alone))
    return made


@dataclass
class Off:
    """A network with its directions and autoencoders, and what switches its features off.

    The direction's *readers* are its parts in the matrices that read the stream, W_in of every layer: moved alone, they
    take a feature away from the neurons without touching what neurons write. That they do better was found on network
    100, which is not reported.
    """

    model: ResidMLP
    decomposition: Decomposition
    data: Float[Tensor, "n features"]
    sites: dict[tuple[int, float], Site]
    owner: Int[Tensor, " features"] = field(init=False)
    parts: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        truth = self.model.truth()
        self.owner, _ = recovery.owners(recovery.strength(self.decomposition, truth))
        self.parts = recovery.owned_parts(self.decomposition.directions(), self.owner, truth)

    def moves(self, feature: int) -> dict[str, list[Try]]:
        """By method, the moves that a feature may be switched off by."""
        mine = {name: block[feature] for name, block in self.parts.items()}
        names = [name for name in mine if "W_in" in name]
        reach = 2 * self._own(feature)
        moves = {
            "direction": [(along(self.decomposition, int(self.owner[feature])), reach, True)],
            "its readers": [(switches.restricted(self.model, mine, names), 2 * reach, True)],
        }
        if len(self.model.layers) > 1:
            layers = self.model.truth().layers.values()
            few = [*layers, *([name] for name in names)]  # whole, or its readers, as with all layers
            moves["one layer of it"] = [(switches.restricted(self.model, mine, some), 2 * reach, True) for some in few]
        return moves | {"neuron": self._neurons(feature), "autoencoder": self._units(feature)}

    def _own(self, feature: int) -> float:
        """The length of what of the weights touches the feature's embedding."""
        e = self.model.W_E[feature]
        squares = [(w @ e).square().sum() for _, w_in, w_out in self.model.weights for w in (w_in, w_out.T)]
        return torch.stack(squares).sum().sqrt().item()

    def _neurons(self, feature: int, most: int = 3) -> list[Try]:
        places = [(name, j) for name, w_in, _ in self.model.weights for j in range(len(w_in))]
        strongest = self.model.contributions()[feature].abs().topk(most).indices.tolist()
        return [
            (switches.without(self.model, f"{name}.W_out.weight", j), 3.0, False)
            for name, j in (places[k] for k in strongest)
        ]

    def _units(self, feature: int, most: int = 2) -> list[Try]:
        return [
            (switches.scaled_unit(sae, self.model, f"layers.{layer}.relu", unit), 3.0, False)
            for (layer, _), (sae, strength) in self.sites.items()
            for unit in strength[feature].topk(most).indices.tolist()
            if strength[feature, unit] > 0
        ]

    def rows(self, tested: int) -> Iterator[dict[str, Any]]:
        """What each method leaves of each of the first features that own a direction, and does to the rest.

        For every feature that of a method's moves, and its step, at which left and elsewhere add up to least.
        """
        for feature in (self.owner >= 0).nonzero()[:tested, 0].tolist():
            on = samples_with(feature, len(self.owner), 60)
            task = switches.Switch(self.model, lambda m, x: m.computed(x), on, self.data[:600], feature)
            for name, moves in self.moves(feature).items():
                effects = [task.off(move, largest, both=both) for move, largest, both in moves]
                if effects:
                    effect = switches.best(effects)
                    scores = {"left": effect.left, "beside": effect.beside, "elsewhere": effect.elsewhere}
                    yield {"feature": feature, "method": name, **scores}


def samples_with(feature: int, features: int, size: int) -> Float[Tensor, "size features"]:
    """Samples of the data with one feature on, positive."""
    x = resid_mlp.data(size, features, torch.Generator().manual_seed(6 + feature))
    x[:, feature] = torch.rand(size, generator=torch.Generator().manual_seed(7 + feature))
    return x
