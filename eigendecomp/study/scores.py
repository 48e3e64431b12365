"""Scores: who owns what, how alike two sets of directions are, how much is rebuilt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigendecomp.decomposition import Decomposition
from eigendecomp.sparsity import Sparsity
from eigendecomp.support.examples import Inputs
from eigendecomp.support.extras import need


@dataclass
class Ownership:
    """Which known feature each direction answers to, from strengths (features, directions)."""

    owner: Int[Tensor, " v"]  # the feature with the largest strength in each direction
    selectivity: Float[Tensor, " v"]  # that feature's strength over the next one's
    owned: int  # features that own at least one direction

    def clearest(self, features: int) -> Int[Tensor, " features"]:
        """The direction that each feature owns with the largest selectivity; −1 for a feature that owns none."""
        value, index = self._own(features).max(1)
        return torch.where(value > 0, index, -1)

    def by_feature(self, features: int) -> Float[Tensor, " features"]:
        """The selectivity with which each feature owns its clearest direction; 0 for a feature that owns none."""
        return self._own(features).amax(1)

    def _own(self, features: int) -> Float[Tensor, "features v"]:
        return (self.owner == torch.arange(features).unsqueeze(1)) * self.selectivity


def ownership(strength: Float[Tensor, "features v"]) -> Ownership:
    """Who owns each direction, and by how much.

    Raises:
        ValueError: for fewer than two features, among which nothing can be told apart.
    """
    if len(strength) < 2:
        raise ValueError(f"ownership compares at least two features; got {len(strength)}")
    top = strength.topk(2, 0)
    return Ownership(
        top.indices[0], top.values[0] / top.values[1].clamp_min(1e-12), int(top.indices[0].unique().numel())
    )


def max_cosine(learned: Float[Tensor, "v d"], truth: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """For every true vector the largest |cosine| with a learned one."""
    return cosines(learned, truth).abs().amax(0)


def matched_cosine(a: Float[Tensor, "v d"], b: Float[Tensor, "w d"]) -> Float[Tensor, " m"]:
    """|cosine| of the pairs of the one-to-one matching that makes their sum largest."""
    similarity = cosines(a, b).abs()
    rows, columns = need("study", "scipy.optimize").linear_sum_assignment(-similarity.detach().numpy())
    return similarity[torch.as_tensor(rows), torch.as_tensor(columns)]


def cosines(a: Float[Tensor, "v d"], b: Float[Tensor, "w d"]) -> Float[Tensor, "v w"]:
    """Cosine similarity of every pair; zero for a zero vector."""
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


@dataclass(frozen=True)
class Thresholds(Sparsity):
    """Keep what reaches its direction's own threshold."""

    each: tuple[float, ...]

    def keep(self, z: Float[Tensor, "n v"], threshold: float | None) -> Float[Tensor, "n v"]:
        """s at inference; ``threshold`` is not looked at."""
        return z * (z.abs() >= z.new_tensor(self.each))


def encoder_rows(d: Decomposition) -> Decomposition:
    """The decomposition whose directions are the encoder's rows, at unit norm, so that one can move along them.

    Where gradients overlap, decoder rows are the gradients themselves and encoder rows their duals: a step along
    one leaves the outputs of the samples that other directions stand for where they were. A coefficient is kept where
    it was before: each threshold is divided, like its row, by the row's norm. There being one for every row,
    ``threshold`` is ``None``.
    """
    rows = d.encoder.map(lambda factor: factor.detach().clone())
    sparsity = d.settings.sparsity
    if d.threshold is not None:
        sparsity = Thresholds(tuple((d.threshold / rows.norms().clamp_min(1e-30)).tolist()))
    rows = rows.normalize_()
    settings = replace(d.settings, tied=True, sparsity=sparsity)
    return Decomposition(d.target, settings, rows, rows, None, d.pool, d.history)


def activation_along(root: Float[Tensor, "n k w"], rows: Float[Tensor, "v w"]) -> Float[Tensor, "n v"]:
    """√(uᵀHu) along rows held as numbers, from R(x) with H = RᵀR."""
    return torch.einsum("nkw,vw->nvk", root, rows).norm(dim=-1)


@torch.no_grad()
def responses(
    d: Decomposition, inputs: Inputs, steps: Sequence[float], directions: Sequence[int] | None = None
) -> Float[Tensor, "v s n k"]:
    """f(x, w + δ u_v) for all directions (or those named), steps δ and inputs."""
    numbers = range(d.decoder.n) if directions is None else directions
    examples = (inputs,) if isinstance(inputs, Tensor) else inputs
    outputs = []
    for number in numbers:
        for step in steps:
            with d.perturbed({number: step}) as model:
                outputs.append(model(*examples))
    return torch.stack(outputs).unflatten(0, (len(numbers), len(steps)))


def gradient_rows(d: Decomposition, inputs: Inputs, seed: int = 0) -> Float[Tensor, "n w"]:
    """The gradients that :meth:`Decomposition.encode` reads, formed: small problems only."""
    return torch.cat([gradients.flat() for gradients in d.gradients(inputs, 1, seed)])


def largest_share(energy: Float[Tensor, "features v"]) -> Float[Tensor, " v"]:
    """The share of each direction's energy (its squared strength, summed) that comes from one feature."""
    return energy.amax(0) / energy.sum(0).clamp_min(1e-30)


def fewest(energy: Float[Tensor, "features v"], share: float = 0.9) -> Int[Tensor, " features"]:
    """For every feature how many directions carry this share of its energy, the strongest first."""
    carried = energy.sort(1, descending=True).values.cumsum(1) / energy.sum(1, keepdim=True).clamp_min(1e-30)
    return (carried < share).sum(1) + 1
