"""How well units resolve known concepts: average precision, with units chosen on one split and scored on another.

Scores are one number for each sample and unit, larger where the unit is more on; concepts are true or false for each
sample. Nothing here knows where scores come from, so directions, autoencoders and floors are judged alike.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from eigendecomp.support.random import generator

DRAWS = 4000  # of the bootstrap
RARE = 0.05  # share of the samples that a concept is true of, at most, for purity
CANDIDATES = 10  # units among which a concept's team is sought


def average_precision(scores: Float[Tensor, "n v"], concepts: Bool[Tensor, "n m"]) -> Float[Tensor, "v m"]:
    """The area under each unit's precision-recall curve for each concept, in [0, 1]; tied scores count as one step.

    Raises:
        ValueError: if a score is not a number, or a concept is true of no sample, since precision has no meaning then.
    """
    if scores.isnan().any():
        raise ValueError(f"the scores of unit {int(scores.isnan().any(0).nonzero()[0])} are not all numbers")
    if len(scores) != len(concepts):
        raise ValueError(f"{len(scores)} scored samples, but {len(concepts)} with concepts")
    total = concepts.sum(0)
    if not total.all():
        raise ValueError(f"concept {int((total == 0).nonzero()[0])} is true of no sample; leave it out")
    own = scores.T.contiguous()
    rank = len(scores) - torch.searchsorted(own.sort(1).values, own, out_int32=True)  # how many score as much or more
    return torch.stack([_precision(rank[:, concept]) for concept in concepts.unbind(1)], 1)


def _precision(rank: Int[Tensor, "v p"]) -> Float[Tensor, " v"]:
    """Mean over a concept's samples: of all that score as much or more, the share that the concept is true of."""
    rank = rank.sort(1).values
    correct = torch.arange(1, rank.shape[1] + 1, device=rank.device).expand_as(rank)
    tied = rank[:, 1:] == rank[:, :-1]
    if tied.any():  # precision is read where a run of equal scores ends
        ends = F.pad(~tied, (0, 1), value=True)
        correct = correct.where(ends, rank.shape[1]).flip(1).cummin(1).values.flip(1)
    return (correct / rank).mean(1)


def oriented(scores: Float[Tensor, "n v"], on: Float[Tensor, "k v"] | None = None) -> Float[Tensor, "n v"]:
    """Signed scores with each unit's sign, which is arbitrary, turned so that its heavier tail is positive.

    The tail is that of ``on`` where given (another split), by the sum of cubes.
    """
    tail = (scores if on is None else on).double().pow(3).sum(0)
    return scores * torch.where(tail < 0, -1.0, 1.0).to(scores)


@dataclass
class Resolution:
    """For every concept the best unit, and how well it and a team of units do on samples they were not chosen on."""

    unit: Int[Tensor, " m"]
    single: Float[Tensor, " m"]
    team: Float[Tensor, " m"]


def resolve(
    chosen_on: tuple[Float[Tensor, "n v"], Bool[Tensor, "n m"]],
    scored_on: tuple[Float[Tensor, "k v"], Bool[Tensor, "k m"]],
    size: int = 3,
) -> Resolution:
    """Choose each concept's best unit, and its best ``size`` together, on one split; score them on the other.

    A team's score is a weighted sum: units are added one at a time, among the best few, by the least-squares fit of the
    concept that they allow.
    """
    (scores, concepts), (held, truth) = chosen_on, scored_on
    precision = average_precision(scores, concepts)
    unit = precision.argmax(0)
    single = _diagonal(held[:, unit], truth)
    mean, scale = scores.mean(0), scores.std(0).clamp_min(1e-12)
    x, y = (scores - mean) / scale, concepts.to(scores)
    gram, along = (x.T @ x).double(), (x.T @ (y - y.mean(0))).double()
    sums = []
    for m in range(concepts.shape[1]):
        among = precision[:, m].topk(min(CANDIDATES, scores.shape[1])).indices
        team, weights = _team(gram[among][:, among], along[among, m], size)
        sums.append(((held[:, among[team]] - mean[among[team]]) / scale[among[team]]) @ weights.to(held))
    return Resolution(unit, single, _diagonal(torch.stack(sums, 1), truth))


def purity(scores: Float[Tensor, "n v"], concepts: Bool[Tensor, "n m"], top: int = 20) -> Float[Tensor, " v"]:
    """The largest share of each unit's ``top`` samples that one concept is true of, of concepts that are ``RARE``.

    Units that are on in fewer samples are judged by those alone; one that is never on has purity 0.

    Raises:
        ValueError: if no concept is rare enough.
    """
    rare = concepts[:, concepts.double().mean(0) <= RARE].to(scores.dtype)
    if not rare.shape[1]:
        raise ValueError(f"every concept is true of more than {RARE:.0%} of the samples")
    value, index = scores.topk(min(top, len(scores)), 0)
    on = (value > 0).to(scores.dtype)
    held = torch.einsum("kvm,kv->vm", rare[index], on) / on.sum(0).clamp_min(1).unsqueeze(1)
    return held.amax(1)


def _team(gram: Float[Tensor, "c c"], along: Float[Tensor, " c"], size: int) -> tuple[list[int], Float[Tensor, " t"]]:
    """Columns of x added one at a time so that least squares explains most of y, and weights; from xᵀx and xᵀy."""
    gram = gram + 1e-6 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram)).to(gram)
    team: list[int] = []
    weights = along[:0]
    for _ in range(min(size, len(gram))):
        trials = torch.tensor([[*team, c] for c in range(len(gram)) if c not in team])
        solved = torch.linalg.solve(gram[trials.unsqueeze(2), trials.unsqueeze(1)], along[trials])
        best = int((solved * along[trials]).sum(1).argmax())
        team, weights = trials[best].tolist(), solved[best]
    return team, weights


def _diagonal(scores: Float[Tensor, "n m"], concepts: Bool[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """Each score's precision for its own concept."""
    precisions = []
    for row, concept in zip(scores.T.contiguous(), concepts.T, strict=True):
        rank = len(row) - torch.searchsorted(row.sort().values, row[concept])
        precisions.append(_precision(rank.unsqueeze(0)))
    return torch.cat(precisions)


@dataclass
class Paired:
    """A mean difference over concepts and seeds, its 95% interval, and its standard error."""

    mean: float
    low: float
    high: float
    error: float


def paired(mine: Float[Tensor, "s m"], theirs: Float[Tensor, "r m"]) -> Paired:
    """How much better one kind of units does than another on the same concepts, from a precision by seed and concept.

    The interval is a bootstrap's: concepts are drawn again, the same for both, and the seeds of either. So it tells how
    far the difference would move with other concepts of the kind and other fits.
    """
    draw = generator(0, "bootstrap")
    s, r, m = len(mine), len(theirs), mine.shape[1]
    concepts = torch.randint(m, (DRAWS, m), generator=draw)
    means = []
    for precision, count in ((mine, s), (theirs, r)):
        often = F.one_hot(torch.randint(count, (DRAWS, count), generator=draw), count).sum(1) / count
        means.append((often.to(precision) @ precision).gather(1, concepts).mean(1))
    gap = means[0] - means[1]
    low, high = gap.quantile(torch.tensor([0.025, 0.975]).to(gap)).tolist()
    return Paired((mine.mean() - theirs.mean()).item(), low, high, gap.std().item())
