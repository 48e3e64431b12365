"""Scores that hold for every decomposition of parameters: those of the peers for ours, and ours for theirs.

A *component* of a weight is a matrix; a decomposition gives (c, i, o) of them. A *row* is a direction over all weights
together, flattened.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Shapes
from eigendecomp.gradients import Formed
from eigendecomp.study.floors import sparse_error
from eigendecomp.study.scores import Ownership, gradient_rows, matched_cosine, ownership
from eigendecomp.support.examples import Inputs
from eigendecomp.support.extras import need

Parts = Mapping[str, Float[Tensor, "c *shape"]]
ON = 0.1  # the causal importance above which a component counts as used

# ---- theirs, on components of a weight W (features, hidden), whose row i is feature i's vector


def coefficients(components: Float[Tensor, "c i o"], weight: Float[Tensor, "i o"]) -> Float[Tensor, " c"]:
    """a that minimises ‖W − Σ a_c u_c‖, the smallest where there are several: how directions add up to a weight."""
    rows = components.flatten(1).double()
    return (torch.linalg.pinv(rows.T) @ weight.flatten().double()).to(weight)


def signed(components: Float[Tensor, "c i o"], weight: Float[Tensor, "i o"]) -> Float[Tensor, "c i o"]:
    """Directions, which have no sign and no length, scaled so that they add up to the weight as well as they can."""
    return coefficients(components, weight)[:, None, None] * components


def feature_cosines(components: Float[Tensor, "c i o"], weight: Float[Tensor, "i o"]) -> Float[Tensor, "c i"]:
    """The cosine of each component's vector for feature i with the weight's, signed."""
    return torch.cosine_similarity(components, weight.unsqueeze(0), dim=-1)


def largest_cosines(components: Float[Tensor, "c i o"], weight: Float[Tensor, "i o"]) -> Float[Tensor, " i"]:
    """max_c cos of every feature: its mean is MMCS, its least value says more."""
    return feature_cosines(components, weight).amax(0)


def length_ratios(components: Float[Tensor, "c i o"], weight: Float[Tensor, "i o"]) -> Float[Tensor, " i"]:
    """‖u_{c,i}‖ / ‖W_i‖ at the component of the largest cosine: the mean is ML2R."""
    best = feature_cosines(components, weight).argmax(0)
    return components[best, range(len(weight))].norm(dim=-1) / weight.norm(dim=-1)


def own_cosines(components: Float[Tensor, "c i o"], weight: Float[Tensor, "i o"]) -> Float[Tensor, " i"]:
    """The cosine at the component in which feature i has the longest vector: few components cannot score by chance."""
    best = components.norm(dim=-1).argmax(0)
    return feature_cosines(components, weight)[best, range(len(weight))]


def matching(ci: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
    """The component of each feature in the one-to-one matching of the largest total importance; −1 where none is left.

    ``ci`` holds the importances of features on alone.
    """
    rows, columns = need("study", "scipy.optimize").linear_sum_assignment(-ci.detach().numpy())
    component = torch.full((len(ci),), -1)
    component[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return component


def identity_error(ci: Float[Tensor, "n c"], tolerance: float = 0.1) -> int:
    """How many importances are wrong if each feature should have one component, and no other above ``tolerance``."""
    match = matching(ci)
    own = torch.zeros_like(ci, dtype=torch.bool)
    has = match >= 0
    own[has.nonzero()[:, 0], match[has]] = True
    missing = int((ci[own] < 1 - tolerance).sum()) + int((~has).sum())
    return missing + int((ci[~own] > tolerance).sum())


def dense_error(ci: Float[Tensor, "n c"], k: int, tolerance: float = 0.1) -> int:
    """How many importances are wrong if k components should be on for some feature each, and the others for none.

    The k are those of the largest total importance.
    """
    order = ci.sum(0).argsort(descending=True)
    first, rest = ci[:, order[:k]], ci[:, order[k:]]
    unused = (first >= 1 - tolerance).sum(0) == 0
    return int(unused.sum()) + max(0, k - first.shape[1]) + int((rest > tolerance).sum())


def l0(ci: Float[Tensor, "n c"]) -> float:
    """Components used in a sample, on average."""
    return (ci > ON).sum(1).double().mean().item()


# ---- ours, on rows and gradients


def refitted(d: Decomposition, inputs: Inputs) -> Float[Tensor, "v w"]:
    """Each direction as a unit row, fitted to the samples that keep its coefficient and no other.

    Where features meet in a sample, each one's gradient bends the others' rows; these samples hold one alone. A
    direction that no sample keeps alone stays as it was learned.
    """
    gradients, kept, learned = gradient_rows(d, inputs), d.encode(inputs, sparse=True), d.decoder.flat().detach()
    sole = (kept != 0).sum(1) == 1
    rows = kept[sole].T @ gradients[sole]  # Σ s g, which least squares gives but for the length
    return torch.where(rows.norm(dim=1, keepdim=True) > 0, torch.nn.functional.normalize(rows, dim=1), learned)


def rows_of(components: Parts, shapes: Shapes) -> Float[Tensor, "v w"]:
    """Every component of every weight as a unit row over all weights, zero outside its own; zero ones are dropped."""
    blocks = [components[name].flatten(1) for name in shapes]
    rows = torch.block_diag(*blocks)
    return torch.nn.functional.normalize(rows[rows.norm(dim=1) > 1e-8], dim=1)


def joined(components: Parts, ci: Mapping[str, Float[Tensor, "n c"]], shapes: Shapes) -> Float[Tensor, "n w"]:
    """One unit row a feature: in every weight its components, weighed by their importance when it is on alone."""
    blocks = [(ci[name] @ components[name].flatten(1)) for name in shapes]
    return torch.nn.functional.normalize(torch.cat(blocks, 1), dim=1)


def parts_of(rows: Float[Tensor, "v w"], shapes: Shapes) -> dict[str, Float[Tensor, "v *shape"]]:
    """Rows taken apart into the weights."""
    return Formed(shapes, rows).dense()


def dual(rows: Float[Tensor, "v w"]) -> Float[Tensor, "v w"]:
    """Rows that read each direction and not the others: the encoder that a dictionary without one would best have."""
    return torch.linalg.pinv(rows.double()).T.to(rows)


def impacts(gradients: Float[Tensor, "f m w"], encoder: Float[Tensor, "v w"]) -> Float[Tensor, "f v"]:
    """Mean |⟨g, u⟩| over each feature's own gradients, feature by feature."""
    return (gradients @ encoder.T).abs().mean(1)


def owned(gradients: Float[Tensor, "f m w"], encoder: Float[Tensor, "v w"]) -> Ownership:
    """Which feature each row answers to."""
    return ownership(impacts(gradients, encoder))


def rebuilt(gradients: Float[Tensor, "n w"], rows: Float[Tensor, "v w"], kept: float) -> float:
    """Normalised error with ``kept`` coefficients a sample, chosen and refitted alike for every method."""
    return sparse_error(gradients, torch.nn.functional.normalize(rows, dim=1), kept)


def alive(coefficients: Float[Tensor, "n v"]) -> int:
    """Directions (or components) that more than a thousandth of the samples use."""
    return int(((coefficients.abs() > 0).double().mean(0) > 1e-3).sum())


def stability(sets: Sequence[Float[Tensor, "v w"]]) -> float:
    """The mean |cosine| of matched rows over all pairs of fits; NaN for one fit."""
    pairs = [matched_cosine(a, b).mean().item() for a, b in combinations(sets, 2)]
    return sum(pairs) / len(pairs) if pairs else float("nan")
