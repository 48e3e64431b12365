"""How much of a known truth directions recover: one score for every target that has ``truth()``."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eigendecomp.decomposition import Decomposition
from eigendecomp.study.moves import Move, along
from eigendecomp.study.scores import ownership

Parts = Mapping[str, Float[Tensor, "n *shape"]]


@dataclass(frozen=True)
class Truth:
    """What computes each feature of a network, known.

    Args:
        inputs: examples that show the features.
        objects: by parameter, the part of it that computes each feature, as (features, *shape).
        layers: by name, the parameters that make up a layer; a feature's object may have a part in each. If none are
            named, every parameter is one.
        contributions: the neuron contributions NC(i) of parts given for every feature, or of the network's own weights
            if none are given, neurons of all layers side by side; None where there are no neurons.
        samples: which of the inputs' samples (all places of the first example, then of the second) show each feature;
            None where sample i shows feature i alone.
        acted: scores, by name, of a network moved along a direction until a feature is gone, as well as it goes; none
            for a feature that is not to be removed.
    """

    inputs: Tensor
    objects: dict[str, Float[Tensor, "features *shape"]]
    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    contributions: Callable[..., Float[Tensor, "features neurons"]] | None = None
    samples: Bool[Tensor, "features samples"] | None = None
    acted: Callable[[Move, int], dict[str, float]] | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", {name: (name,) for name in self.objects})


class Known(Protocol):
    """A target whose features are known."""

    def truth(self) -> Truth: ...


@dataclass(frozen=True)
class Recovery:
    """How directions do against a truth. What belongs to a feature that owns no direction counts as zero."""

    features: int
    owned: int  # features that own a direction by impact
    selectivity: float  # mean over features: the own impact on its direction over the next feature's
    least_selectivity: float
    mean_cosine: dict[str, float]  # by layer, over features: of the owner's part with the object's
    least_cosine: dict[str, float]
    mean_reader: dict[str, float]  # the same of the leading singular vectors of the layer's first tensor, last axis
    least_reader: dict[str, float]
    nc: float | None  # mean over features of the r² of neuron contributions, neurons of all layers together
    least_nc: float | None
    acted: dict[str, float] = field(default_factory=dict)  # scores of networks moved along owners, mean over features

    def row(self) -> dict[str, float]:
        """The scores on one line; of layers the mean of means and the least of all."""
        few: dict[str, float] = {name: value for name, value in asdict(self).items() if isinstance(value, (int, float))}
        for name in ("cosine", "reader"):
            means, least = asdict(self)[f"mean_{name}"].values(), asdict(self)[f"least_{name}"].values()
            few |= {f"mean_{name}": sum(means) / len(means), f"least_{name}": min(least)}
        return few | self.acted


def recovery(d: Decomposition, target: Known | Truth, *, references: int = 16) -> Recovery:
    """The scores of a decomposition's directions against a target's truth, or a truth itself."""
    truth = target if isinstance(target, Truth) else target.truth()
    impact = strength(d, truth, references)
    scores = recovered(impact, d.directions(), truth)
    return scores if truth.acted is None else replace(scores, acted=moved(d, owners(impact)[0], truth.acted))


def strength(d: Decomposition, truth: Truth, references: int = 16) -> Float[Tensor, "features v"]:
    """Mean impact of every direction on the samples of each feature."""
    return by_feature(d.impact(truth.inputs, references), truth)


def by_feature(impact: Float[Tensor, "samples v"], truth: Truth) -> Float[Tensor, "features v"]:
    """Means over the samples of each feature."""
    return impact if truth.samples is None else torch.stack([impact[shown].mean(0) for shown in truth.samples])


def moved(
    d: Decomposition, owner: Int[Tensor, " features"], acted: Callable[[Move, int], dict[str, float]]
) -> dict[str, float]:
    """The mean over features of each score of the network moved along what the feature owns; not at all if nothing."""
    scores: dict[str, list[float]] = {}
    for feature, v in enumerate(owner.tolist()):
        for name, value in acted(along(d, v if v >= 0 else {0: 0.0}), feature).items():
            scores.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def recovered(strength: Float[Tensor, "features v"], directions: Parts, truth: Truth) -> Recovery:
    """The scores of directions held as numbers, (v, *shape) by parameter, with their strengths on the truth's inputs.

    A parameter that is not among them has no part in any direction.

    Raises:
        ValueError: if no parameter of the truth is among them.
    """
    owned, selective = owners(strength)
    own = owned_parts(directions, owned, truth)
    cosine, reader = {}, {}
    for layer, names in truth.layers.items():
        flat = [torch.cat([parts[name].flatten(1) for name in names], 1) for parts in (own, truth.objects)]
        cosine[layer] = torch.cosine_similarity(*flat, dim=1).abs()
        vectors = [leading(parts[names[0]]) for parts in (own, truth.objects)]
        reader[layer] = torch.cosine_similarity(*vectors, dim=1).abs()
    nc = None if truth.contributions is None else agreement(truth.contributions(own), truth.contributions())
    means, least = ([each(scores, kind) for scores in (cosine, reader)] for kind in ("mean", "min"))
    return Recovery(
        len(strength), int((owned >= 0).sum()), selective.mean().item(), selective.min().item(),
        means[0], least[0], means[1], least[1],
        None if nc is None else nc.mean().item(), None if nc is None else nc.min().item(),
    )  # fmt: skip


def owners(strength: Float[Tensor, "features v"]) -> tuple[Int[Tensor, " features"], Float[Tensor, " features"]]:
    """Of the directions that each feature owns the one that it uses most, and its selectivity there.

    A feature owns the directions on which no other is stronger, and may own several: those that answer to it when it
    is negative are faint when it is positive, and as selective. One that owns none has the direction −1, selectivity 0.
    """
    owner = ownership(strength)
    mine = (owner.owner == torch.arange(len(strength)).unsqueeze(1)) * strength
    value, index = mine.max(1)
    return torch.where(value > 0, index, -1), torch.where(value > 0, owner.selectivity[index], 0)


def owned_parts(directions: Parts, index: Int[Tensor, " features"], truth: Truth) -> dict[str, Tensor]:
    """By parameter of the truth, the part of the direction that each feature owns; zero where there is none."""
    if not truth.objects.keys() & directions.keys():
        raise ValueError(f"directions over {[*directions]} have no part in the truth's parameters {[*truth.objects]}")
    parts = {}
    for name, whole in truth.objects.items():
        mine = directions[name].detach()[index.clamp_min(0)] if name in directions else torch.zeros_like(whole)
        parts[name] = mine * (index >= 0).view(-1, *[1] * (mine.ndim - 1))
    return parts


def leading(parts: Float[Tensor, "n out in"]) -> Float[Tensor, "n in"]:
    """The leading input-side singular vector of every matrix, times its singular value; vectors as they are."""
    if parts.ndim == 2:
        return parts
    matrices = parts.flatten(2)
    gram = matrices @ matrices.mT  # the shorter side is the neurons'
    vector = torch.linalg.eigh(gram).eigenvectors[:, :, -1:]
    return (vector.mT @ matrices)[:, 0]


def agreement(learned: Float[Tensor, "n neurons"], truth: Float[Tensor, "n neurons"]) -> Float[Tensor, " n"]:
    """Squared correlation over neurons of each feature's contributions; 0 where those learned are all alike.

    Directions have no length of their own, so that contributions are known up to a factor.
    """
    a, b = (x - x.mean(1, keepdim=True) for x in (learned, truth))
    return torch.cosine_similarity(a, b, dim=1).square()


def each(scores: Mapping[str, Float[Tensor, " features"]], kind: str) -> dict[str, float]:
    """The mean or the least over features, by layer."""
    return {layer: getattr(values, kind)().item() for layer, values in scores.items()}
