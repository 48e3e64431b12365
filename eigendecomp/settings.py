"""What decides a fit, and what happened in it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from eigendecomp import divergence as divergences
from eigendecomp import reference as references
from eigendecomp import sparsity as sparsities
from eigendecomp.directions import Directions, Factorization
from eigendecomp.divergence import Divergence
from eigendecomp.reference import Draws, Reference
from eigendecomp.sparsity import Sparsity
from eigendecomp.support.checks import choice, real, whole
from eigendecomp.support.random import generator
from eigendecomp.support.show import Shown
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

    def __post_init__(self) -> None:
        for name in ("n_directions", "rank", "steps", "batch_size", "restarts"):
            whole(name, getattr(self, name))
        whole("seed", self.seed, 0)
        real("learning_rate", self.learning_rate, above=0)
        if self.interference is not None:
            real("interference", self.interference, least=0)
        if self.prune is not None:
            real("prune (share of the squared gradients)", self.prune, above=0, most=1)
        choice("factorization", self.factorization, "cp", "tucker")
        choice("samples", self.samples, "outputs", "uses")
        if self.scale not in (None, "unit") or (self.scale and self.samples == "outputs"):
            raise ValueError(f"scale={self.scale!r} must be None, or 'unit' with samples='uses'")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied={self.tied!r} must be True or False")
        for name, kind in (("divergence", Divergence), ("reference", Reference), ("sparsity", Sparsity)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be a {kind.__name__}, such as those in eigendecomp"
                )

    def start(self, target: Target, role: str = "directions") -> Directions:
        """Random directions for a target, from the seed and a role."""
        like = {"generator": generator(self.seed, role), "dtype": target.dtype, "device": target.device}
        return Directions.random(target.shapes, self.n_directions, self.rank, self.factorization, **like)

    def pool(self, f: Float[Tensor, "e p k"]) -> Float[Tensor, "m k"]:
        """What references are made of, from the outputs of examples."""
        predictions = self.divergence.predict(f.flatten(0, 1))
        return self.reference.prepare(self.divergence, predictions, generator(self.seed, "pool"))

    def draws(self, pool: Tensor, shape: tuple[int, int], draws: int, generator: torch.Generator) -> Draws:
        """``draws`` references from the pool for each of the (examples, positions) samples."""
        return Draws.of(self.reference, self.divergence, pool, shape, draws, generator)

    def as_json(self) -> dict[str, Any]:
        """Plain values only, each object as its name and its fields."""
        rules = {key: getattr(self, key) for key in ("divergence", "reference", "sparsity")}
        plain = {key: {"name": type(rule).__name__, **asdict(rule)} for key, rule in rules.items()}
        return {**vars(self), **plain, "parameters": list(self.parameters)}


@dataclass(repr=False)
class History(Shown):
    """What happened, by step: loss, normalised error, coefficients kept a sample, share of dead directions.

    And after it: ``pruned``, the numbers of the directions that were left out, and ``restarts``, the training error of
    every fit that was compared.
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)
    pruned: list[int] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)

    def by_step(self) -> dict[str, list[float]]:
        """The lists that have one entry for each step that was logged."""
        return {name: getattr(self, name) for name in ("step", "loss", "error", "kept", "dead")}

    def add(self, *values: float) -> None:
        """What is new at a step, in the order of :meth:`by_step`."""
        for held, value in zip(self.by_step().values(), values, strict=True):
            held.append(value)

    def summary(self) -> list[tuple[str, str]]:
        """Where the fit ended; what was not logged is left out."""
        if not self.error:  # the direct method rebuilds nothing
            return [("loss", f"{self.loss[-1]:.3g} after {self.step[-1] + 1} steps" if self.step else "none logged")]
        lines = {
            "error": f"{self.error[-1]:.3f} of the squared gradients left after {self.step[-1] + 1} steps",
            "kept": f"{self.kept[-1]:.2f} coefficients a sample",
            "dead": f"{self.dead[-1]:.0%}",
        }
        return [*lines.items(), *([("pruned", f"{len(self.pruned)} directions")] if self.pruned else [])]

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
        named = getattr(module, str(fields.pop("name")), None)
        if not (isinstance(named, type) and issubclass(named, kind)):
            raise ValueError(f"unknown {kind.__name__.lower()} {value['name']!r}")
        return named(**fields)

    modules = {Divergence: divergences, Reference: references, Sparsity: sparsities}
    rules = {k.__name__.lower(): make(module, k, plain[k.__name__.lower()]) for k, module in modules.items()}
    return Settings(**{**plain, **rules, "parameters": tuple(plain["parameters"])})
