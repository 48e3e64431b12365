"""Where directions start: at gradients of samples that are unlike each other, chosen as k-means++ chooses centres."""

import math
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from eigendecomp.batches import Batches
from eigendecomp.directions import Directions
from eigendecomp.gradients import Gradients
from eigendecomp.settings import Settings
from eigendecomp.support import parallel
from eigendecomp.support.random import generator
from eigendecomp.target import Target

BATCHES = 8  # from which samples are chosen; more where they have fewer than twice as many samples as directions
SWEEPS = 4  # of the power method
SMALLEST = 0.01  # share of its norm that a direction has in any tensor, at least
LEAST = 1e-6  # share of the gradients, beneath which directions hold them all
OTHERS = 0.1  # size of a direction's other terms, which are random, beside the first


@torch.no_grad()
def at_samples(
    target: Target, settings: Settings, batches: Batches, draw: torch.Generator, role: str, *, hidden: bool = True
) -> Directions:
    """Directions whose first term in every tensor is the outer product that is nearest to a sample's gradient.

    Samples are chosen one after the other, each with a probability in proportion to the share of its gradient that no
    direction chosen before holds, 1 − max_v cos²(g, u_v) (k-means++; Arthur and Vassilvitskii, 2007). So gradients that
    are small or rare get directions too, where random directions all turn to what is large.
    """
    u, chance = settings.random(target, role), generator(settings.seed, f"{role} at samples")
    ends = torch.linspace(0, u.n, 1 + max(BATCHES, math.ceil(2 * u.n / settings.batch_size))).long().tolist()
    first = Directions.random(target.shapes, u.n, 1, generator=chance, dtype=target.dtype, device=target.device)
    for start, end in tqdm(list(pairwise(ends)), disable=hidden, desc="start", leave=False):
        if end > start:
            gradients = batches.batch(settings.batch_size, draw)
            nearest = outer_products(gradients, target, chance).map(parallel.gathered)
            chosen = unlike(gradients, nearest, first.select(range(start)), end - start, chance)
            for mine, theirs in zip(first.tensors(), nearest.tensors(), strict=True):
                mine[start:end] = theirs[chosen]
    return with_first_terms(u, first)


def outer_products(gradients: Gradients, target: Target, chance: torch.Generator) -> Directions:
    """For every sample the outer products that are nearest to its gradient, a tensor each, by the power method.

    ⟨g, u⟩ is linear in each factor of u: its derivative there is the gradient contracted with the other factors.
    """
    n = len(gradients) * parallel.processes()
    every = Directions.random(target.shapes, n, 1, generator=chance, dtype=target.dtype, device=target.device)
    u, sizes = every.select(range(n)[parallel.share(n)]), {}
    for axis in [*range(max(map(len, u.factors.values())))] * SWEEPS:
        moving = {name: factors[axis] for name, factors in u.factors.items() if axis < len(factors)}
        with torch.enable_grad():
            for factor in moving.values():
                factor.requires_grad_()
            slopes = torch.autograd.grad(gradients.inner_own(u).sum(), list(moving.values()))
        for (name, factor), slope in zip(moving.items(), slopes, strict=True):
            norms = slope.norm(dim=2, keepdim=True)
            factor.requires_grad_(False).copy_(torch.where(norms > 0, slope / norms, factor))
            sizes[name] = norms[:, 0, 0]
    # A part of size zero would never train, since every factor's derivative contains the others.
    least = SMALLEST * torch.stack(list(sizes.values())).norm(dim=0)
    for name, tensor in u.tensor.items():
        tensor.scale_(sizes[name].maximum(least).where(least > 0, 1.0))
    return u.normalize_()


def unlike(
    gradients: Gradients, nearest: Directions, chosen: Directions, n: int, chance: torch.Generator
) -> Int[Tensor, " n"]:
    """Numbers of n samples, each unlike those before it and the directions that are chosen already."""
    squares = parallel.gathered(gradients.square_norms())
    present = (squares > torch.finfo(squares.dtype).eps * squares.max()).to(squares.dtype)
    squares = squares.where(present > 0, 1).unsqueeze(1)
    left = present
    if chosen.n:
        left = left * (1 - parallel.gathered(gradients.inner(chosen)).square() / squares).amin(1).clamp_min(0)
    rest = (1 - parallel.gathered(gradients.inner(nearest)).square() / squares).clamp_min(0)
    numbers = []
    for _ in range(n):
        # Where the directions hold all gradients, or there are none, it does not matter which is taken.
        some = next(p for p in (left, present, torch.ones_like(left)) if p.sum() > LEAST)
        numbers.append(int(torch.multinomial(some.cpu(), 1, generator=chance)))
        left = torch.minimum(left, rest[:, numbers[-1]])
    return torch.tensor(numbers)


def with_first_terms(u: Directions, first: Directions) -> Directions:
    """Directions whose first term is given and whose others, random, are small beside it."""
    for name, factors in u.factors.items():
        terms = [factor[:, 0] for factor in first.factors[name]]
        if u.factorization == "tucker":
            core, *factors = factors
            core *= OTHERS / core[0].numel() ** 0.5
            core[(slice(None), *[0] * (core.ndim - 1))] = math.prod(term.norm(dim=1) for term in terms)
            terms = [normalize(term, dim=1) for term in terms]
        for factor, term in zip(factors, terms, strict=True):
            factor *= OTHERS ** (1 / len(terms)) if u.factorization == "cp" else 1
            factor[:, 0] = term
    return u.normalize_()
