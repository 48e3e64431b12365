"""Every decomposition of one network, scored alike: ours and the peers', with their scores and with ours."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp.curvature import jacobian
from eigendecomp.decomposition import Decomposition
from eigendecomp.sparsity import cutoff
from eigendecomp.study import floors
from eigendecomp.study.peers import l3d, spd
from eigendecomp.support import files
from eigendecomp.target import Target
from rooms.peers import networks, reconstruction, residual, scores
from rooms.peers.networks import Directions

OURS, REFITTED, SPD = "ours", "ours, refitted", "SPD"
VECTORS = ("tms", "identity", "large")  # where each row of W_in is a feature's vector, and nothing else
KEPT = {"large": 2.0, "resid1": 2.0, "resid2": 2.0}  # coefficients a sample; 1 elsewhere
CHUNK = 50  # samples of which Jacobians are formed at once
TOLERANCE = 0.2  # of importances


class Problem:
    """A network with the gradients on which every method is scored: against other samples' outputs."""

    def __init__(self, name: str, held_out: int, references: int) -> None:
        self.name, self.network, self.model = name, networks.NETWORKS[name], networks.load(name)
        self.target = Target(self.model, networks.weights(self.model))
        draw = torch.Generator().manual_seed(7)
        self.x, self.held_out = (self.network.data(n, draw) for n in (self.network.samples, held_out))
        alone = self.network.alone()
        self.alone = self.gradients(alone.flatten(0, 1), references).unflatten(0, alone.shape[:2]).flatten(1, 2)
        self.rows = self.gradients(self.held_out, 1)[:, 0]

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n inputs"], count: int) -> Float[Tensor, "n references w"]:
        """Against the outputs of ``count`` other samples."""
        f, others = self.model(x), self.model(self.x[-count * len(x) :]).unflatten(0, (-1, count))
        c = l3d.cotangents(f.unsqueeze(1), others)
        few = zip(c.split(CHUNK), x.split(CHUNK), strict=True)
        return torch.cat([torch.einsum("nrk,nkw->nrw", part, jacobian(self.target, (rows,))) for part, rows in few])

    @property
    def weights(self) -> dict[str, Float[Tensor, "i o"]]:
        """By name, in the order in which they are used."""
        return {stage.name: stage.weight.detach() for stage in self.model.stages()}  # type: ignore[operator]

    @property
    def single(self) -> Float[Tensor, "features inputs"]:
        """Each feature on alone at three quarters, as SPD's scores have it."""
        if self.name == "squares":
            return 0.75 * torch.eye(self.network.features)
        return 0.75 * self.network.alone().mean(1)


@dataclass
class Entry:
    """One decomposition of a network: what it writes, by what it is read, and what it took.

    Ours and L3D's have encoders. For the others the readers are the duals of the rows, which favours them.
    """

    method: str
    seed: int
    rows: Float[Tensor, "v w"]
    reader: Float[Tensor, "v w"]
    seconds: float = 0.0
    steps: int | None = None
    ours: Decomposition | None = None
    theirs: spd.SPD | None = None  # the components of a run of SPD
    kept: float | None = None  # L3D's share of coefficients


def runs(name: str, method: str) -> dict[int, tuple[dict[str, Tensor], dict[str, Any]]]:
    """By seed, the tensors and what is known of the runs that are there."""
    paths = sorted(networks.FOLDER.glob(f"{name}-{method}-*.safetensors"))
    return {int(path.stem.rsplit("-", 1)[1]): files.read(path) for path in paths}


def trained(p: Problem, tensors: dict[str, Tensor], about: Mapping[str, Any]) -> spd.SPD:
    """The trained components and gates of a run of SPD."""
    made = spd.SPD(p.model.stages(), about["settings"]["count"], hidden=about["settings"]["hidden"])  # type: ignore[operator]
    made.load_state_dict(tensors)
    return made


def entries(p: Problem, fits: Mapping[int, Directions]) -> Iterator[Entry]:
    """Ours, by seed, the peers' from their files, and floors.

    SPD's components of different matrices are joined into one row a feature by their importance when that feature is on
    alone, which takes the features to be known and favours it.
    """
    for seed, fit in fits.items():
        d = fit.decomposition
        learned, reader = d.decoder.flat().detach(), d.encoder.flat().detach()
        yield Entry(OURS, seed, learned, reader, fit.seconds, ours=d)
        yield Entry(REFITTED, seed, fit.refitted, reader, fit.seconds, ours=d)
    for seed, (tensors, about) in runs(p.name, "spd").items():
        made = trained(p, tensors, about)
        rows = scores.joined(made.components(), made.importance(p.single), p.target.shapes)
        yield Entry(SPD, seed, rows, scores.dual(rows), about["seconds"], about["steps"], theirs=made)
    for seed, (tensors, about) in runs(p.name, "npeff").items():
        yield Entry("NPEFF", seed, tensors["rows"], scores.dual(tensors["rows"]), about["seconds"], about["steps"])
    for method, title in (("l3d", "L3D, paper"), ("l3dcode", "L3D, its code")):
        for seed, (tensors, about) in runs(p.name, method).items():
            took, kept = (about["seconds"], about["steps"]), about["settings"]["kept"]
            yield Entry(title, seed, tensors["decoder"], tensors["encoder"], *took, kept=kept)
    k = p.network.features
    components = floors.principal_directions(p.gradients(p.x[:300], 1)[:, 0], k)
    random = floors.random_directions(p.target.shapes, k, 1, seed=0).flat()
    for title, rows in (("principal components", components), ("random", random)):
        yield Entry(title, 0, rows, scores.dual(rows))


def both_ways(p: Problem, entry: Entry) -> dict[str, Any]:
    """The scores that every network has: ours on gradients, and how many units a sample uses."""
    own = scores.owned(p.alone, entry.reader)
    row: dict[str, Any] = {
        "method": entry.method, "seed": entry.seed, "owned": own.owned,
        "selectivity": own.by_feature(p.network.features).mean().item(),
        "error": scores.rebuilt(p.rows, entry.rows, KEPT.get(p.name, 1.0)), "seconds": entry.seconds,
        "steps": entry.steps,
    }  # fmt: skip
    if entry.theirs is not None:
        importance = entry.theirs.importance(p.held_out).values()
        row |= {
            "alive": sum(scores.alive(g * (g > scores.ON)) for g in importance),
            "l0": sum(map(scores.l0, importance)),
        }
    if entry.ours is not None:
        z = entry.ours.encode(p.held_out, sparse=True)
        row |= {"alive": scores.alive(z), "l0": (z != 0).sum(1).double().mean().item()}
        row["own error"] = entry.ours.reconstruction_error(p.held_out)  # at its threshold, against its reference
    if isinstance(p.model, residual.Residual):
        return row | shared(p, p.model, entry)
    return row | (vectors(p, entry) if p.name in VECTORS else {})


def shared(p: Problem, model: residual.Residual, entry: Entry) -> dict[str, float]:
    """The scores of residual networks: what rows say of every neuron (notebook layers), and SPD's own."""
    if entry.theirs is not None:
        components = entry.theirs.components()
        errors = residual.importances(entry.theirs.importance(p.single), model.neurons, TOLERANCE)
        nc, cosines = residual.contributions(model, components), residual.own_cosines(components, p.weights)
        return {
            "contributions": nc.mean().item(), "least contributions": nc.min().item(),
            "identity errors": errors["identity_error"], "dense errors": errors["dense_error"],
            "reader cosine": cosines.mean().item(), "least reader cosine": cosines.min().item(),
        }  # fmt: skip
    found = residual.recovered(model, entry.rows, scores.impacts(p.alone, entry.reader))
    row: dict[str, float] = {"contributions": found.nc or 0.0, "least contributions": found.least_nc or 0.0}
    if entry.ours is not None:
        kept = (entry.ours.encode(p.single, sparse=True) != 0).float()
        row |= {"identity errors": scores.identity_error(kept, TOLERANCE)}
    return row


def vectors(p: Problem, entry: Entry) -> dict[str, float]:
    """The peers' scores, where each row of W_in is a feature's vector; ours get lengths by least squares on W_in."""
    weight = p.weights["W_in"]
    if entry.theirs is not None:
        components, ci = entry.theirs.components()["W_in"], entry.theirs.importance(p.single)["W_in"]
    else:
        components = scores.signed(scores.parts_of(entry.rows, p.target.shapes)["W_in"], weight)
        ci = None if entry.ours is None else (entry.ours.encode(p.single, sparse=True) != 0).float()
    largest, own = scores.largest_cosines(components, weight), scores.own_cosines(components, weight)
    errors = {} if ci is None else {"identity errors": scores.identity_error(ci, TOLERANCE)}
    return {
        "MMCS": largest.mean().item(), "least max cosine": largest.min().item(), "own cosine": own.mean().item(),
        "least own cosine": own.min().item(), "ML2R": scores.length_ratios(components, weight).mean().item(), **errors,
    }  # fmt: skip


def in_place(p: Problem, entry: Entry) -> dict[str, Any] | None:
    """How well components in the weights' place compute what these do; None for a method without importances.

    A direction has a length in every weight, by least squares on it, and is important where its coefficient is kept.
    """
    if entry.theirs is not None:
        components = reconstruction.stacked(entry.theirs.components())
        ci = torch.cat(list(entry.theirs.importance(p.held_out).values()), 1)
    elif entry.ours is not None or entry.kept is not None:
        components = reconstruction.filled(entry.rows, p.weights)
        z = p.rows @ entry.reader.T if entry.ours is None else entry.ours.encode(p.held_out, sparse=True)
        ci = ((z != 0) if entry.kept is None else (z.abs() >= cutoff(z, entry.kept))).float()
    else:
        return None
    scored = reconstruction.reconstruction(p.model.stages(), components, p.held_out, ci, seed=0)  # type: ignore[operator]
    left = [(component.sum(0) - p.weights[name]).square().sum() for name, component in components.items()]
    size = sum(weight.square().sum() for weight in p.weights.values())
    return {
        "method": entry.method, "seed": entry.seed, "components": ci.shape[1], "CI-L0": scores.l0(ci),
        "weights missed": (sum(left) / size).item(), **asdict(scored),
    }  # fmt: skip


# ---- time

Point = dict[str, Any]  # network, seed, method, steps, seconds and a score, such as the mean own cosine


def curves(names: list[str], score: str = "own_cosine") -> list[Point]:
    """Runs of SPD as they trained, and our fits of several lengths in the same processes."""
    rows = []
    for name in names:
        for seed, (_, about) in runs(name, "spd").items():
            for method, points in ((OURS, about["ours"]), (SPD, about["history"])):
                rows += [
                    {"network": name, "seed": seed, "method": method, "steps": point.get("steps", point.get("step")),
                     "seconds": point["seconds"], score: point[score]}
                    for point in points
                ]  # fmt: skip
    return rows


def soonest(curve: list[Point], level: float) -> float | None:
    """The fewest seconds in which a curve reaches a cosine; None if it never does."""
    reached = [point["seconds"] for point in curve if point["own_cosine"] >= level]
    return min(reached) if reached else None


def speeds(points: list[Point], levels: Mapping[str, float]) -> list[Point]:
    """By network and seed, the seconds of each to the network's level, and how many times SPD's are ours."""
    rows: list[Point] = []
    for name, seed in dict.fromkeys((point["network"], point["seed"]) for point in points):
        here = [point for point in points if (point["network"], point["seed"]) == (name, seed)]
        ours, theirs = (soonest([p for p in here if p["method"] == m], levels[name]) for m in (OURS, SPD))
        times = None if ours is None or theirs is None else theirs / ours
        rows.append({"network": name, "seed": seed, "level": levels[name], OURS: ours, SPD: theirs, "times": times})
    return rows
