"""What decides a fit, and what happened in it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from eigendecomp import divergence as divergences
from eigendecomp import reference as references
from eigendecomp import sparsity as sparsities
from eigendecomp.directions import Factorization
from eigendecomp.divergence import Divergence
from eigendecomp.reference import Reference
from eigendecomp.sparsity import Sparsity
from eigendecomp.support.checks import real, whole


@dataclass(frozen=True)
class Settings:
    """Everything that decides a fit, besides the target and the data."""

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
    samples: Literal["outputs", "uses"] = "outputs"  # whose gradients are rebuilt
    scale: Literal["unit"] | None = None  # whether uses count alike, whatever the size of their gradients
    interference: float | None = None  # weight of the direct method's second loss; None for a fit of gradients

    def __post_init__(self) -> None:
        for name in ("n_directions", "rank", "steps", "batch_size"):
            whole(name, getattr(self, name))
        whole("seed", self.seed, 0)
        real("learning_rate", self.learning_rate, above=0)
        if self.interference is not None:
            real("interference", self.interference, least=0)
        if self.factorization not in ("cp", "tucker"):
            raise ValueError(f"factorization={self.factorization!r} must be 'cp' or 'tucker'")
        if self.samples not in ("outputs", "uses"):
            raise ValueError(f"samples={self.samples!r} must be 'outputs' or 'uses'")
        if self.scale not in (None, "unit") or (self.scale and self.samples == "outputs"):
            raise ValueError(f"scale={self.scale!r} must be None, or 'unit' with samples='uses'")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied={self.tied!r} must be True or False")
        for name, kind in (("divergence", Divergence), ("reference", Reference), ("sparsity", Sparsity)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be a {kind.__name__}, such as those in eigendecomp"
                )

    def as_json(self) -> dict[str, Any]:
        """Plain values only, each object as its name and its fields."""
        plain = {key: value for key, value in vars(self).items()}
        for key in ("divergence", "reference", "sparsity"):
            value = plain[key]
            plain[key] = {"name": type(value).__name__, **asdict(value)}
        return plain | {"parameters": list(self.parameters)}


@dataclass
class History:
    """What happened, by step: loss, normalised error, coefficients kept a sample, share of dead directions."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float, error: float, kept: float, dead: float) -> None:
        for name, value in zip(vars(self), (step, loss, error, kept, dead), strict=True):
            getattr(self, name).append(value)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Self:
        """The history whose fields a file holds; ValueError if they are not lists of numbers."""
        for name, values in plain.items():
            if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
                raise ValueError(f"the history of {name!r} is not a list of numbers")
        return cls(**{name: list(values) for name, values in plain.items()})


def settings_from(plain: Mapping[str, Any]) -> Settings:
    """The settings that :meth:`Settings.as_json` described; only classes of this package can be named."""

    def make(module: Any, kind: type, value: Mapping[str, Any]) -> Any:
        fields = dict(value)
        found = getattr(module, str(fields.pop("name")), None)
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise ValueError(f"unknown {kind.__name__.lower()} {value['name']!r}")
        return found(**fields)

    return Settings(
        **{
            **plain,
            "parameters": tuple(plain["parameters"]),
            "divergence": make(divergences, Divergence, plain["divergence"]),
            "reference": make(references, Reference, plain["reference"]),
            "sparsity": make(sparsities, Sparsity, plain["sparsity"]),
        }
    )
