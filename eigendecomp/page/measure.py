"""What all samples and directions have to do with each other.

Every number comes from J u, what the directions do to each sample's output to first order: activations are ‖S^½ J u‖,
and a coefficient is the product ⟨Jᵀc, u⟩ = ⟨c, J u⟩ with a reference's cotangent. So samples go through the model once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from eigendecomp.curvature import push_forward
from eigendecomp.decomposition import CHUNK, Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import SquaredError
from eigendecomp.gradients import EachOutput
from eigendecomp.page.readout import Readout
from eigendecomp.reference import Draws
from eigendecomp.support.algebra import sum_of
from eigendecomp.support.examples import Examples, chunks
from eigendecomp.support.models import at_once
from eigendecomp.support.random import generator
from eigendecomp.target import Target

MEMORY = 1 << 28  # bytes of J u at a time
CACHE = 1 << 23  # bytes of arrays that are gone through several times
HIDDEN = 1e-3  # a share of J u by which its products may be wrong


@dataclass
class Measured:
    """What the methods of these names return, and what the rest of the page is made from."""

    activation: Float[Tensor, "n v"]
    impact: Float[Tensor, "n v"]
    z: Float[Tensor, "n v"]  # encode()
    interactions: Float[Tensor, "v v"]
    readout: Readout  # of whose features the following are
    features: Float[Tensor, "n h"]
    along: Float[Tensor, "n v h"] | None  # what directions do to them to first order; None where that is large


@torch.no_grad()
def measure(d: Decomposition, examples: Examples, references: int, seed: int, progress: bool = False) -> Measured:
    """Read all samples along all directions."""
    s = d.settings
    draws = 1 if s.reference.fixed else references
    noises = generator(seed, "encode"), generator(seed, "encode")
    activation, impact, z, features, along, readout = [], [], [], [], [], Readout.of(d.target, single(examples))
    cross = torch.zeros(d.decoder.n, d.decoder.n, dtype=torch.float64)
    bar = tqdm(total=len(examples[0]), disable=not progress, desc="page: samples", leave=False)
    for e, h, encoded, decoded in changes(d, readout, examples):
        bar.update(e)
        f, shape = readout(h), (e, len(h) // e)
        a, b = readout.pair(s.divergence, f, decoded)
        activation.append((a * b).sum(-1).clamp_min(0).sqrt().to(h.dtype))
        cross += torch.einsum("nvk,nwk->vw", a, b).cpu()
        features.append(h)
        if decoded.nbytes // e * len(examples[0]) <= MEMORY:
            along.append(decoded)
        for noise, m, products in zip(noises, (draws, 1), (impact, z), strict=True):
            c = Draws.of(s.reference, s.divergence, d.pool, shape, m, noise)(f.view(*shape, -1)).flatten(0, 1)
            products.append(encoded @ readout.back(c).mT)  # (n, v, m)
    bar.close()
    scale = cross.diagonal().clamp_min(0).sqrt()
    scale = scale.outer(scale)
    return Measured(
        torch.cat(activation),
        torch.cat([one.abs().mean(-1) for one in impact]),
        torch.cat(z).squeeze(-1),
        torch.where(scale > 0, cross / scale, 0.0),
        readout,
        torch.cat(features),
        torch.cat(along) if along else None,
    )


def changes(
    d: Decomposition, readout: Readout, examples: Examples
) -> Iterator[tuple[int, Float[Tensor, "n h"], Float[Tensor, "n v h"], Float[Tensor, "n v h"]]]:
    """A few examples at a time: their number, features h, and ∂h/∂w u for the encoder's and the decoder's directions.

    Backwards, as the gradients of all outputs, where these are few; else forwards, direction by direction.
    """
    both = d.encoder if d.settings.tied else d.encoder.beside(d.decoder)
    p, h = readout.before.outputs(single(examples)).shape[1:]
    wide = both.n if readout.weight is None else readout.weight.shape[1]
    most, few = max(1, min(CHUNK, MEMORY // (4 * p * h * both.n))), max(1, CACHE // (4 * p * h * wide))
    pairs = forwards(readout.before, both, examples, most)
    if readout.weight is None and p * h <= both.n:  # gradients of 32 MB at a time: fresh memory is slow
        pairs = backwards(d, both, examples, max(16, min(most, CACHE // (p * h * d.target.size))))
    for features, y in pairs:
        for f, one in zip(features.split(few * p), y.split(few * p), strict=True):
            yield len(f) // p, f, one[:, : d.encoder.n], one[:, -d.decoder.n :]


def backwards(
    d: Decomposition, u: Directions, examples: Examples, most: int
) -> Iterator[tuple[Float[Tensor, "n k"], Float[Tensor, "n v k"]]]:
    """The outputs f of all samples, and J u from the gradients of every output, ``most`` examples at a time."""
    for some in chunks(examples, most):
        f = d.target.outputs(some)
        y = d.captured(some)(some, EachOutput()).inner(u)
        yield f.flatten(0, 1), y.unflatten(0, (-1, f.shape[-1])).mT


def forwards(
    target: Target, u: Directions, examples: Examples, most: int
) -> Iterator[tuple[Float[Tensor, "n k"], Float[Tensor, "n v k"]]]:
    """The same, from the change of the outputs along every direction."""
    size, few = at_once(partial(target.outputs, single(examples)), target.chosen, most, u.n, MEMORY)
    for some in chunks(examples, size):
        yield first_order(target, u, some, few)


def first_order(
    target: Target, u: Directions, examples: Examples, few: int = 1
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n v k"]]:
    """The outputs f and J u, ``few`` directions at a time: the derivative in c of ⟨Jᵀc, u⟩, which is linear in c.

    Twice backwards takes half the time of once forwards, for which torch computes derivatives that are zero. That the
    second derivative is there shows at ⟨c, J u⟩ = ⟨Jᵀc, u⟩: a function of torch's may leave it out without a word.
    """
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            chosen = {name: p.detach().requires_grad_() for name, p in target.chosen.items()}
            f = target.call(examples, chosen)
            c = torch.randn(f.shape, generator=generator(0, "first order")).to(f).requires_grad_()
            back = torch.autograd.grad(f, list(chosen.values()), c, create_graph=True, allow_unused=True)
        used, y, rest = {name: g for name, g in zip(chosen, back, strict=True) if g is not None}, [], []
        for some in torch.arange(u.n).split(few):
            tangents = {name: u.select(some).dense(name).view(-1, *g.shape) for name, g in used.items()}
            given = list(used.values()), c, list(tangents.values())
            y += torch.autograd.grad(*given, is_grads_batched=True, retain_graph=True)
            inner = sum_of([tangents[name].flatten(1) @ g.flatten() for name, g in used.items()])
            rest.append((y[-1] * c).flatten(1).sum(1) - inner)
        if torch.cat(rest).norm() <= HIDDEN * (torch.cat(y) * c).norm():
            return f.detach().flatten(0, 1), torch.cat(y).movedim(0, 2).flatten(0, 1)
    except RuntimeError as error:  # of an operation without a second derivative
        if "allocate" in str(error):  # of memory, on any device
            raise
    return target.outputs(examples).flatten(0, 1), push_forward(target, SquaredError(), u, examples) / 2**0.5


def single(examples: Examples) -> Examples:
    """The first example alone."""
    return tuple(tensor[:1] for tensor in examples)
