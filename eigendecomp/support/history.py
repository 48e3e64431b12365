"""What happened in a fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from eigendecomp.support.show import Shown


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
        """Where the fit ended."""
        steps = self.step[-1] + 1 if self.step else 0
        if not self.error:  # the direct method rebuilds nothing
            return [("loss", f"{self.loss[-1]:.3g} after {steps} steps") if steps else ("steps", "none logged")]
        lines = {
            "error": f"{self.error[-1]:.3f} of the squared gradients left after {steps} steps",
            "kept": f"{self.kept[-1]:.2f} coefficients a sample",
            "dead": f"{self.dead[-1]:.0%}",
        }
        return [*lines.items(), *([("pruned", f"{len(self.pruned)} directions")] if self.pruned else [])]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The history whose fields a file holds; ValueError if they are not lists of numbers."""
        for name, values in plain.items():
            if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
                raise ValueError(f"the history of {name!r} is not a list of numbers")
        return cls(**{name: list(values) for name, values in plain.items()})
