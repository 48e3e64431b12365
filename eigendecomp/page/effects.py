"""What directions do to the outputs: to first order, and when the parameters are pushed along them by steps.

Several directions run through the model at once, as far as memory goes.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import KLDivergence
from eigendecomp.page.measure import MEMORY, Measured, first_order, single
from eigendecomp.page.samples import plain
from eigendecomp.support.examples import Examples, alike
from eigendecomp.target import Target

LISTED = 8  # outputs: how many are listed of each kind
LINES = 6  # outputs whose course is drawn
STEPS = (-2.0, -1.0, 1.0, 2.0)  # pushes, over the mean activation of the top samples
TOGETHER = 16  # directions that run through the model at once, at most

log = logging.getLogger(__name__)


@torch.no_grad()
def effects(
    d: Decomposition,
    measured: Measured,
    examples: Examples,
    samples: Int[Tensor, "v m"],
    top: int,
    name: Callable[[int], str],
    steps: Sequence[float] | None,
) -> Iterator[tuple[dict[str, Any], Float[Tensor, "m k"]]]:
    """What every direction does to the mean output of its ``top`` first samples; and J u of all of its samples."""
    target, divergence, readout = d.target, d.settings.divergence, measured.readout
    predict = lambda h: divergence.predict(readout(h))  # noqa: E731
    p, width = readout.before.outputs(single(examples)).shape[1:]
    norm = torch.stack([value.square().sum() for value in target.chosen.values()]).sum().sqrt().item()
    deltas = sorted({*map(float, STEPS if steps is None else steps)} - {0.0})
    size = MEMORY // (4 * (len(deltas) + 1) * (target.size + 8 * samples.shape[1] * p * width))
    for some in torch.arange(d.decoder.n).split(max(1, min(size, TOGETHER))):
        u, at = d.decoder.select(some), samples[some] % p
        shown = alike(examples, (tensor[samples[some].to(tensor.device) // p] for tensor in examples))  # (v, m, …)
        if measured.along is None:
            pairs = [first_order(readout.before, u.select([i]), tuple(x[i] for x in shown)) for i in range(u.n)]
            place = torch.arange(at.shape[1]) * p + at
            h, y = (torch.stack([one[j][i] for one, i in zip(pairs, place, strict=True)]).flatten(2) for j in range(2))
        else:
            h, y = measured.features[samples[some]], measured.along[samples[some], some[:, None]]
        f, y = readout(h), readout.along(y)
        still, shown = divergence.predict(f[:, :top]).mean(1), alike(shown, (tensor[:, :top] for tensor in shown))
        activation = divergence.root(f[:, :top], y[:, :top]).norm(dim=-1).mean(1)
        # Up to twice over the mean activation, but no farther than the norm of w.
        units = [min(1 / a, norm / STEPS[-1]) if a > 0 else 0.0 for a in activation.tolist()]
        sizes = [[delta * (unit if steps is None else 1.0) for delta in deltas] for unit in units]
        lines = pushed(readout.before, u, shown, at[:, :top], torch.tensor(sizes).to(still), predict)
        for i, far in enumerate(sizes):
            course = [(0.0, still[i])] + [pair for pair in zip(far, lines[i], strict=True) if pair[0]]
            yield effect(y[i, :top].mean(0), dict(course), isinstance(divergence, KLDivergence), name), y[i]


def effect(
    mean: Float[Tensor, " k"], course: dict[float, Float[Tensor, " k"]], logits: bool, name: Callable[[int], str]
) -> dict[str, Any]:
    """What a direction promotes and suppresses, from its mean J u, and the course of the outputs it moves most."""
    mean = mean - mean.mean() if logits else mean  # logits have no zero of their own
    up, down = (side.topk(min(LISTED, len(mean))) for side in (mean, -mean))
    steps = sorted(course)
    lines = torch.stack([course[step] for step in steps])
    kept = (lines.max(0).values - lines.min(0).values).topk(min(LINES, len(mean))).indices.tolist()
    return {
        "promoted": [[name(int(i)), plain(value)] for value, i in zip(*up, strict=True) if value > 0],
        "suppressed": [[name(int(i)), plain(-value)] for value, i in zip(*down, strict=True) if value > 0],
        "push": {"steps": plain(steps), "lines": [[name(i), plain(lines[:, i])] for i in kept]},
    }


def pushed(
    target: Target,
    u: Directions,
    examples: Examples,
    at: Int[Tensor, "v e"],
    sizes: Float[Tensor, "v d"],
    predict: Callable[[Tensor], Tensor],
) -> Float[Tensor, "v d k"]:
    """The mean prediction of each direction's own examples (v, e, …), at positions ``at``, with w + δ u for each δ."""
    if not sizes.shape[1]:
        return sizes.new_zeros(len(sizes), 0, 0)
    chosen = {name: value.detach() for name, value in target.chosen.items()}
    changes = {name: u.dense(name).view(-1, *value.shape) for name, value in chosen.items()}

    def course(change: dict[str, Tensor], sizes: Tensor, at: Tensor, *own: Tensor) -> Tensor:
        def end(delta: Tensor) -> Tensor:
            values = {name: value + delta * change[name] for name, value in chosen.items()}
            f = target.call(alike(examples, own), values)
            return predict(f.gather(1, at.to(f.device)[:, None, None].expand(-1, 1, f.shape[2])).squeeze(1)).mean(0)

        return each(end, sizes)  # what comes before the parameters is run once for all steps

    return each(course, changes, sizes, at, *examples).nan_to_num()  # what overflows is not drawn


def each(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function`` of all arguments along their first axes: at once, or one by one where torch cannot."""
    count = len(tree_leaves(arguments)[0])
    if count > 1:
        try:
            return torch.func.vmap(function)(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("torch.func.vmap cannot run this model, so directions are taken one by one: %s", error)
    results = [function(*tree_map(lambda tensor, i=i: tensor[i], arguments)) for i in range(count)]
    return tree_map(lambda *one: torch.stack(one), *results)
