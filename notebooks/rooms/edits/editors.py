"""Edits of one weight, from a behaviour's gradient: along given rows, in closed form, and learned.

A weight W is (in, out) here. The gradient G of a behaviour's log mass, a mean over labelled examples, says how a change
Δ lowers it, ⟨G, Δ⟩ to first order, and a second moment H of the model's own gradients what it costs, ½ ΔᵀHΔ. Each
editor gives a change that lowers the mass; only its direction counts, as steps are chosen by
:class:`rooms.edits.edits.Bench`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from eigendecomp.study.moves import LoRA, Tuned, tune
from eigendecomp.support.examples import Inputs
from eigendecomp.target import Target


@dataclass(frozen=True)
class Site:
    """What arrives at a weight, and what draws of the model's own outputs ask there, use by use."""

    x: Float[Tensor, "n in"]
    asked: Float[Tensor, "n out"]

    @property
    def inputs(self) -> Float[Tensor, "in in"]:
        """E[xxᵀ]."""
        return self.x.mT @ self.x / len(self.x)

    @property
    def outputs(self) -> Float[Tensor, "out out"]:
        """E[δδᵀ]."""
        return self.asked.mT @ self.asked / len(self.asked)

    @property
    def diagonal(self) -> Float[Tensor, "in out"]:
        """The diagonal of the Fisher matrix, E[(x ⊗ δ)²]."""
        return self.x.square().mT @ self.asked.square() / len(self.x)


@dataclass(frozen=True)
class Rows:
    """Changes of rank one, reader ⊗ writer, each of unit norm."""

    readers: Float[Tensor, "v in"]
    writers: Float[Tensor, "v out"]

    def __post_init__(self) -> None:
        for name in ("readers", "writers"):
            object.__setattr__(self, name, normalize(getattr(self, name), dim=1))

    def inner(self, g: Float[Tensor, "in out"]) -> Float[Tensor, " v"]:
        """⟨G, u⟩ of every row."""
        return ((self.readers @ g) * self.writers).sum(1)

    def fisher(self, site: Site) -> Float[Tensor, "v v"]:
        """E[zzᵀ] with z = ⟨x ⊗ δ, u⟩: the second moment of the site's gradients within the rows' span."""
        z = (site.x @ self.readers.mT) * (site.asked @ self.writers.mT)
        return z.mT @ z / len(z)

    def gram(self) -> Float[Tensor, "v v"]:
        """Inner products of the rows."""
        return (self.readers @ self.readers.mT) * (self.writers @ self.writers.mT)

    def sum(self, steps: Float[Tensor, " v"]) -> Float[Tensor, "in out"]:
        """Σ s u."""
        return torch.einsum("v,vi,vo->io", steps, self.readers, self.writers)


def folded(encoder: Float[Tensor, "v in"], decoder: Float[Tensor, "v in"], weight: Float[Tensor, "in out"]) -> Rows:
    """An autoencoder's units as changes of the weight after it: what the unit reads, times what W makes of its row."""
    return Rows(encoder, decoder @ weight)


def regressed(
    z: Float[Tensor, "n v"], decoder: Float[Tensor, "v in"], weight: Float[Tensor, "in out"], site: Site, ridge: float
) -> Rows:
    """The same with the linear reader that comes closest to what the unit is on samples: C⁻¹ E[xz].

    A unit's own encoder row reads every sample, also those at which its threshold turns the unit off.
    """
    return whitened_readers(Rows(z.mT @ site.x, decoder @ weight), site, ridge)


def whitened_readers(rows: Rows, site: Site, ridge: float) -> Rows:
    """Rows that meet the same inputs and, as ROME's, others as little as may be: readers C⁻¹a."""
    return Rows(torch.linalg.solve(damped(site.inputs, ridge), rows.readers.mT).mT, rows.writers)


# ---- along rows


def candidates(g: Float[Tensor, "in out"], rows: Rows, fisher: Float[Tensor, "v v"], k: int) -> Int[Tensor, " k"]:
    """The k rows with the largest ⟨G, u⟩² / uᵀHu: to second order, those that halve the mass at the least cost."""
    cost = fisher.diagonal()
    return (rows.inner(g).square() / cost.clamp_min(1e-9 * cost.max())).topk(min(k, len(cost))).indices


def along_row(g: Float[Tensor, "in out"], rows: Rows, number: int) -> Float[Tensor, "in out"]:
    """One row, in the sense that lowers the mass."""
    steps = torch.zeros(len(rows.readers), dtype=g.dtype)
    steps[number] = -rows.inner(g)[number].sign()
    return rows.sum(steps)


def fitted(g: Float[Tensor, "in out"], rows: Rows, k: int) -> Float[Tensor, "in out"]:
    """−G by least squares from k rows, taken one after another by what is left of G (orthogonal matching pursuit)."""
    inner, gram = rows.inner(g), rows.gram()
    chosen: list[int] = []
    steps = torch.zeros_like(inner)
    for _ in range(min(k, len(inner))):
        left = (inner - gram @ steps).abs()
        left[chosen] = -1
        chosen.append(int(left.argmax()))
        steps = torch.zeros_like(inner)
        steps[chosen] = torch.linalg.lstsq(gram[chosen][:, chosen], inner[chosen]).solution
    return rows.sum(-steps)


def natural(
    g: Float[Tensor, "in out"], rows: Rows, fisher: Float[Tensor, "v v"], ridge: float
) -> Float[Tensor, "in out"]:
    """The change in the rows' span that lowers the mass most at a given cost: s = −(F + λ tr F / v)⁻¹ Uᵀg."""
    return rows.sum(-torch.linalg.solve(damped(fisher, ridge), rows.inner(g)))


# ---- in closed form


def damped(matrix: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """M + λ (tr M / n) 1."""
    return matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def rank_one(g: Float[Tensor, "in out"]) -> Float[Tensor, "in out"]:
    """The best change of rank one for −G in the least squares sense."""
    left, size, right = torch.linalg.svd(g, full_matrices=False)
    return -size[0] * left[:, :1] @ right[:1]


def whitened(g: Float[Tensor, "in out"], site: Site, ridge: float) -> Float[Tensor, "in out"]:
    """−C⁻¹ G S⁻¹: the natural gradient with the Fisher matrix taken as a Kronecker product (K-FAC)."""
    half = torch.linalg.solve(damped(site.inputs, ridge), g)
    return -torch.linalg.solve(damped(site.outputs, ridge), half.mT).mT


def rome(g: Float[Tensor, "in out"], key: Float[Tensor, " in"], site: Site, ridge: float) -> Float[Tensor, "in out"]:
    """−C⁻¹k ⊗ Gᵀk: as ROME, the key's place in the inputs' own metric; the value is what G asks where the key is met.

    Meng et al. (2022), eq. 2, with one gradient's value in the place of the one that they optimise.
    """
    return -torch.outer(torch.linalg.solve(damped(site.inputs, ridge), key), g.mT @ key)


# ---- learned


def learned(
    target: Target,
    inputs: Inputs,
    loss: Callable[[Float[Tensor, "n k"]], Tensor],
    *,
    until: float,
    rank: int = 1,
    penalty: float = 0.0,
    fisher: Float[Tensor, "in out"] | None = None,
    learning_rate: float = 1e-2,
    steps: int = 200,
    seed: int = 0,
    writer: Float[Tensor, " out"] | None = None,
) -> Tuned:
    """LoRA on the examples, with a penalty λ Σ F Δ² where a diagonal Fisher matrix is given (EWC).

    The penalty is in units of the mean of F. It stops when the loss, penalty and all, is ``until`` or at the last step.
    ``writer`` is what the first rank starts with in the place of a random row.
    """
    change = LoRA(target, rank, seed)
    if writer is not None:
        with torch.no_grad():
            change.free[1][0] = writer

    def penalised(f: Float[Tensor, "n k"]) -> Tensor:
        if fisher is None:
            return loss(f)
        cost = sum((fisher * moved.square()).sum() for moved in change().values())
        return loss(f) + penalty * cost / fisher.mean()

    return tune(target, change, inputs, penalised, until=until, steps=steps, learning_rate=learning_rate)
