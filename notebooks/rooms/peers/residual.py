"""Residual networks of one and two layers as chains of weights, so that the peers can take them apart.

They are those of the notebook `layers` with identity embedding. Every matrix is turned: (inputs, outputs).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.decomposition import Decomposition
from eigendecomp.study import recovery
from eigendecomp.study.chains import Stage, run
from eigendecomp.study.recovery import Recovery
from eigendecomp.targets.toys import resid_mlp
from rooms import fitting
from rooms.peers import scores


class Residual(nn.Module):
    """x ↦ x + ReLU(x W_in) W_out, layer by layer."""

    def __init__(self, features: int, neurons: int, layers: int) -> None:
        super().__init__()
        for k in range(layers):
            self.register_parameter(f"W_in_{k}", nn.Parameter(torch.zeros(features, neurons)))
            self.register_parameter(f"W_out_{k}", nn.Parameter(torch.zeros(neurons, features)))

    @property
    def neurons(self) -> int:
        """Of each layer."""
        return self.get_parameter("W_in_0").shape[1]

    def stages(self) -> list[Stage]:
        """The weights in the order in which they are used: each reader opens a branch, each writer closes it."""
        return [
            Stage(name, weight, None, torch.relu, opens=True) if "in" in name else Stage(name, weight, closes=True)
            for name, weight in self.named_parameters()
        ]

    def forward(self, x: Float[Tensor, "n features"]) -> Float[Tensor, "n features"]:
        return run(self.stages(), x)


def theirs(name: str) -> str:
    """The name that a weight has in the notebook `layers`."""
    kind, layer = name.rsplit("_", 1)
    return f"layers.{layer}.{kind}.weight"


def untrained(layers: int) -> Residual:
    """A network of the sizes of `layers`."""
    return Residual(**fitting.SIZES[layers], layers=layers)


def train(layers: int) -> Residual:
    """The network 0 of the notebook `layers`."""
    steps = fitting.TRAINING_STEPS["identity"]
    trained, _ = resid_mlp.train(layers, "identity", seed=0, steps=steps, batch_size=256, **fitting.SIZES[layers])
    made, weights = untrained(layers), dict(trained.named_parameters())
    made.load_state_dict({name: weights[theirs(name)].T for name, _ in made.named_parameters()})
    return made


def source(model: Residual) -> resid_mlp.ResidMLP:
    """The same network as `layers` has it, with its truth."""
    weights = dict(model.named_parameters())
    made = resid_mlp.ResidMLP(torch.eye(len(weights["W_in_0"])), model.neurons, len(weights) // 2)
    made.load_state_dict({theirs(name): weight.T for name, weight in weights.items()}, strict=False)  # W_E is set
    return made


def recovered(model: Residual, rows: Float[Tensor, "v w"], strength: Float[Tensor, "features v"]) -> Recovery:
    """The scores of `layers` for rows with their strengths on every feature."""
    shapes = {stage.name: tuple(stage.weight.shape) for stage in model.stages()}
    parts = {theirs(name): part.mT for name, part in scores.parts_of(rows, shapes).items()}
    return recovery.recovered(strength, parts, source(model).truth())


def decomposed(model: Residual, d: Decomposition) -> Recovery:
    """The scores of `layers` for our directions."""
    return recovered(model, d.decoder.flat().detach(), d.impact(source(model).truth().inputs))


def own_cosines(components: scores.Parts, weights: Mapping[str, Tensor]) -> Float[Tensor, "layers features"]:
    """By layer, the cosine of what feature i writes to the neurons, W_in[i], with the component that has most of it."""
    return torch.stack(
        [scores.own_cosines(components[n], w.detach()) for n, w in weights.items() if n.startswith("W_in")]
    )


def importances(ci: Mapping[str, Float[Tensor, "features c"]], neurons: int, tolerance: float) -> dict[str, int]:
    """How many importances of features on alone are wrong, as SPD's authors count, over all layers.

    Each feature should have one component of its own in W_in, and ``neurons`` components should be in use in W_out.
    """
    reads, writes = ([g for name, g in ci.items() if name.startswith(kind)] for kind in ("W_in", "W_out"))
    return {
        "identity_error": sum(scores.identity_error(g, tolerance) for g in reads),
        "dense_error": sum(scores.dense_error(g, neurons, tolerance) for g in writes),
    }


def contributions(model: Residual, components: scores.Parts) -> Float[Tensor, " features"]:
    """r² of every feature's neuron contributions in SPD's components, neurons of all layers together.

    As its authors count: read by one component of each layer, here the one that has most of the feature, and written
    by all of them. Joined by importance the readers would give them too if nothing were taken apart.
    """
    found = []
    for k in range(len(components) // 2):
        reads, writes = components[f"W_in_{k}"], components[f"W_out_{k}"].sum(0).T
        found.append(reads[reads.norm(dim=-1).argmax(0), range(len(writes))] * writes)
    return recovery.agreement(torch.cat(found, 1), source(model).contributions())
