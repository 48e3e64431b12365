"""References for circles in superposition."""

from dataclasses import dataclass

from torch import Tensor

from eigendecomp.divergence import Divergence
from eigendecomp.reference import ModelSample


@dataclass(frozen=True)
class OwnSample(ModelSample):
    """References drawn as :class:`ModelSample` draws them, for the outputs of the circle with the largest output alone.

    With one circle on, what its plane does to the outputs of the others stays out.
    """

    circles: int = 1

    def cotangent(self, divergence: Divergence, f: Tensor, pool: Tensor, noise: Tensor) -> Tensor:
        size = f.unflatten(-1, (self.circles, -1)).square().sum(-1)
        own = (size == size.amax(-1, keepdim=True)).repeat_interleave(f.shape[-1] // self.circles, -1)
        return super().cotangent(divergence, f, pool, noise) * own
