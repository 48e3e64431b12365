"""An edited copy of a model, to keep."""

import copy
from collections.abc import Mapping

from torch import nn

from eigendecomp.decomposition import Decomposition


def edited(d: Decomposition, steps: Mapping[int, float]) -> nn.Module:
    """A deep copy of the model with w + Σ δ u; the model itself stays as it is, and what is tied stays tied.

    In the copy the row of a padded token moves as well, which :meth:`Decomposition.perturbed` keeps still.

    Raises:
        ValueError: if a direction does not exist, or a step is not finite.
    """
    with d.perturbed(steps) as model:
        return copy.deepcopy(model)
