"""How a result shows itself, as text and in a notebook."""

from abc import abstractmethod
from html import escape
from typing import Any


class Shown:
    """Something with a summary: label and value, line by line."""

    @abstractmethod
    def summary(self) -> list[tuple[str, str]]:
        """Labels and values, the most important first."""

    def __repr__(self) -> str:
        lines = [f"  {label}: {value}" for label, value in self.summary()]
        return "\n".join([type(self).__name__, *lines])

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th align=left>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in self.summary()
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{''.join(rows)}</table>"


def of_decomposition(d: Any) -> list[tuple[str, str]]:
    """The shapes, what the fit was asked for, and what became of it."""
    s, shapes = d.settings, ", ".join(f"{name} {shape}" for name, shape in d.decoder.shapes.items())
    settings = f"{s.divergence}, {s.reference}, samples={s.samples!r}, {s.sparsity}"
    kind = f"{d.decoder.n} of rank {s.rank} ({s.factorization}{', tied' if s.tied else ''})"
    return [("directions", kind), ("parameters", shapes), ("rebuilding", settings), *d.history.summary()]
