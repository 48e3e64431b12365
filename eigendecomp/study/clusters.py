"""Clusters to compare with: spherical k-means of inputs, and of gradients that are outer products."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from eigendecomp.support.random import generator

RESTARTS = 3  # of which the best is kept
STEPS, STEPS_OF_PRODUCTS = 30, 20  # of k-means on inputs and on gradients, at most
SEEN = 16384  # rows, drawn at random, among which starts are sought


def inputs(
    x: Float[Tensor, "n d"], count: int, *, seed: int, restarts: int = RESTARTS
) -> tuple[Float[Tensor, "v d"], Int[Tensor, " n"]]:
    """Spherical k-means: unit centres, and each row's centre, of the restart whose rows are closest to their centres.

    Each restart begins with k-means++ on cosines. A centre without rows moves to the row that is farthest from its own.

    Raises:
        ValueError: if there are fewer rows than centres.
    """
    if not 0 < count <= len(x):
        raise ValueError(f"count={count} must be positive and at most the {len(x)} rows")
    x, draw, restarted = normalize(x, dim=1), generator(seed, "clusters"), []
    for _ in range(restarts):
        some = x[torch.randperm(len(x), generator=draw)[: max(SEEN, count)]]
        centres = some[distant_starts(some, torch.ones(len(some), 1), count, draw)]
        centres, nearest, close = settled(x, centres, STEPS, refill=True)
        restarted.append((close.mean().item(), centres, nearest))
    return max(restarted, key=lambda one: one[0])[1:]


def settled(
    x: Float[Tensor, "n d"], centres: Float[Tensor, "v d"], steps: int, *, refill: bool
) -> tuple[Float[Tensor, "v d"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Unit centres after at most so many steps, each unit row's centre, and its cosine with it.

    A centre without rows moves to the row that is farthest from its own if ``refill``, and else stays.
    """
    close, nearest = (x @ centres.T).max(1)
    for _ in range(steps):
        total = torch.zeros_like(centres).index_add_(0, nearest, x)
        empty = total.norm(dim=1) == 0
        moved = normalize(total, dim=1)
        moved[empty] = x[close.argsort()[: int(empty.sum())]] if refill else centres[empty]
        before, centres = nearest, moved
        close, nearest = (x @ centres.T).max(1)
        if torch.equal(before, nearest):
            break
    return centres, nearest, close


def gradients(
    x: Float[Tensor, "n i"],
    delta: Float[Tensor, "n o"],
    count: int,
    *,
    seed: int,
    signed: bool = True,
    by_input: bool = False,
) -> tuple[Float[Tensor, "v i"], Float[Tensor, "v o"]]:
    """k-means of the unit gradients x ⊗ delta with centres a ⊗ b of rank one: the unit factors of every centre.

    A gradient belongs to the centre with the largest cosine, or if not ``signed``, |cosine|. Starts are found by
    k-means++ among gradients, or ``by_input`` by clustering the inputs alone. Each step moves a centre's two factors
    once, as in a power iteration; a centre without gradients stays. The best restart is that with the largest mean.

    Raises:
        ValueError: if there are fewer gradients than centres.
    """
    if not 0 < count <= len(x):
        raise ValueError(f"count={count} must be positive and at most the {len(x)} gradients")
    x, delta = normalize(x, dim=1), normalize(delta, dim=1)
    draw, restarted = generator(seed, "clusters of gradients"), []
    for restart in range(RESTARTS):
        if by_input:
            a, nearest = inputs(x, count, seed=RESTARTS * seed + restart, restarts=1)
            b = normalize(torch.zeros(count, delta.shape[1]).index_add_(0, nearest, delta), dim=1)
        else:
            some = torch.randperm(len(x), generator=draw)[: max(SEEN, count)]
            start = some[distant_starts(x[some], delta[some], count, draw, signed)]
            a, b = x[start].clone(), delta[start].clone()
        restarted.append(settled_products(x, delta, a, b, signed, STEPS_OF_PRODUCTS))
    return max(restarted, key=lambda one: one[0])[1:]


def settled_products(
    x: Float[Tensor, "n i"],
    delta: Float[Tensor, "n o"],
    a: Float[Tensor, "v i"],
    b: Float[Tensor, "v o"],
    signed: bool,
    steps: int,
) -> tuple[float, Float[Tensor, "v i"], Float[Tensor, "v o"]]:
    """The mean cosine of unit gradients x ⊗ delta with their centres a ⊗ b, and the centres, after so many steps."""
    close = x.new_zeros(len(x), 1)
    for step in range(steps + 1):
        met, wanted = x @ a.T, delta @ b.T
        along = met * wanted
        close, nearest = (along if signed else along.abs()).max(1, keepdim=True)
        if step == steps:
            break
        one = nearest[:, 0]
        new_a = torch.zeros_like(a).index_add_(0, one, x * wanted.gather(1, nearest))
        new_b = torch.zeros_like(b).index_add_(0, one, delta * met.gather(1, nearest))
        a = torch.where(new_a.norm(dim=1, keepdim=True) > 0, normalize(new_a, dim=1), a)
        b = torch.where(new_b.norm(dim=1, keepdim=True) > 0, normalize(new_b, dim=1), b)
    return close.mean().item(), a, b


def distant_starts(
    x: Float[Tensor, "n i"], delta: Float[Tensor, "n o"], count: int, draw: torch.Generator, signed: bool = True
) -> Int[Tensor, " v"]:
    """Rows x ⊗ delta that lie apart: each is drawn in proportion to its squared distance from those before it."""
    chosen = [int(torch.randint(len(x), (1,), generator=draw))]
    far = torch.full((len(x),), torch.inf)
    for _ in range(count - 1):
        cosine = (x @ x[chosen[-1]]) * (delta @ delta[chosen[-1]])
        far = torch.minimum(far, (1 - (cosine if signed else cosine.abs())).clamp_min(0))
        chosen.append(int(torch.multinomial(far + 1e-12, 1, generator=draw)))
    return torch.tensor(chosen)


def rebuilt(
    g: Float[Tensor, "m w"], rows: Float[Tensor, "v w"], counts: tuple[int, ...]
) -> dict[int, Float[Tensor, " m"]]:
    """The share of each ‖g‖² in the span of so many rows, which are added one at a time, the most aligned first.

    Rows have unit norm; with fewer rows than a count, all of them are used.
    """
    gram, along = (rows @ rows.T).double(), (g @ rows.T).double()
    total, chosen = g.double().square().sum(1), torch.zeros(len(g), 0, dtype=torch.long)
    shares: dict[int, Tensor] = {}
    left, held = along, torch.zeros_like(total)
    for count in range(1, max(counts) + 1):
        if count <= len(rows):
            taken = torch.zeros_like(along, dtype=torch.bool).scatter_(1, chosen, True)
            chosen = torch.cat([chosen, left.abs().masked_fill(taken, -1).argmax(1, keepdim=True)], 1)
            square = gram[chosen.unsqueeze(2), chosen.unsqueeze(1)] + 1e-9 * torch.eye(count, dtype=torch.double)
            y = along.gather(1, chosen)
            weights = torch.linalg.solve(square, y.unsqueeze(2))
            left = along - (gram[chosen].mT @ weights).squeeze(2)
            held = (weights.squeeze(2) * y).sum(1) / total
        if count in counts:
            shares[count] = held
    return shares
