"""What decides a fit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from eigendecomp.directions import Directions, Factorization
from eigendecomp.divergence import Divergence
from eigendecomp.reference import Reference
from eigendecomp.sparsity import Sparsity
from eigendecomp.support.checks import check_settings
from eigendecomp.support.random import generator
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fit, besides the target and the data: arguments of :func:`eigendecomp.decompose`."""

    divergence: Divergence
    reference: Reference
    parameters: tuple[str, ...]
    n_directions: int
    rank: int
    factorization: Factorization
    tied: bool
    sparsity: Sparsity
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    samples: Literal["outputs", "uses"] = "outputs"
    scale: Literal["unit"] | None = None
    group: Mapping[str, str] | None = None
    interference: float | None = None  # weight of the direct method's second loss; None for a fit of gradients
    prune: float | None = None
    restarts: int = 1
    start: Literal["random", "samples"] = "random"

    def __post_init__(self) -> None:
        check_settings(self, divergence=Divergence, reference=Reference, sparsity=Sparsity)

    def random(self, target: Target, role: str = "directions") -> Directions:
        """Random directions for a target, from the seed and a role."""
        like = {"generator": generator(self.seed, role), "dtype": target.dtype, "device": target.device}
        return Directions.random(target.shapes, self.n_directions, self.rank, self.factorization, **like)

    def pool(self, f: Outputs) -> Float[Tensor, "m k"]:
        """What references are made of, from the outputs of examples."""
        predictions = f.rows(self.divergence.predict)
        return self.reference.prepare(self.divergence, predictions, generator(self.seed, "pool"))

    def as_json(self) -> dict[str, Any]:
        """Plain values only, each object as its name and its fields."""
        rules = {key: getattr(self, key) for key in ("divergence", "reference", "sparsity")}
        plain = {key: {"name": type(rule).__name__, **asdict(rule)} for key, rule in rules.items()}
        return {**vars(self), **plain, "parameters": list(self.parameters)}
