"""Where results go, and the JSON that the paper reads its numbers from."""

import json
import math
import operator
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

PACKAGES = ("torch", "numpy", "matplotlib", "eigendecomp")
# What chooses the kernels of a matrix product, if it is set.
KERNELS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA")
CLOSE = 2.0  # spreads; what is nearer to its bound than this is worded so
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
}  # fmt: skip


def profile() -> str:
    """``paper`` (the default) or ``smoke`` (the same code on less), from the environment variable EIGENDECOMP_PROFILE.

    Raises:
        ValueError: for any other value.
    """
    name = os.environ.get("EIGENDECOMP_PROFILE", "paper")
    if name not in ("paper", "smoke"):
        raise ValueError(f"EIGENDECOMP_PROFILE={name!r} must be 'paper' or 'smoke'")
    return name


def folder() -> Path:
    """The folder of figures: EIGENDECOMP_FIGURES, else ``figures`` beside the package."""
    path = Path(os.environ.get("EIGENDECOMP_FIGURES") or Path(__file__).resolve().parents[2] / "figures")
    path.mkdir(parents=True, exist_ok=True)
    return path


@dataclass(frozen=True)
class Claim:
    """A statement that a number bears out.

    Args:
        name: the key under which it is kept.
        statement: what a text says.
        quantity: the number found.
        comparison: one of ``<``, ``<=``, ``>``, ``>=`` and ``==``.
        bound: the number that it is compared with.
        spread: the standard deviation of the quantity (of a mean over fits, its standard error); 0 if it has none.
        over: how many of what the quantity is found in and its spread is over, such as "20 fits" or "34 concepts".

    Raises:
        ValueError: for another comparison, a number that is not finite, or a negative spread.
    """

    name: str
    statement: str
    quantity: float
    comparison: str
    bound: float
    spread: float = 0.0
    over: str = ""

    def __post_init__(self) -> None:
        if self.comparison not in COMPARISONS:
            raise ValueError(f"{self.name}: comparison={self.comparison!r} must be one of {' '.join(COMPARISONS)}")
        for key in ("quantity", "bound", "spread"):
            if not math.isfinite(getattr(self, key)):
                raise ValueError(f"{self.name}: {key}={getattr(self, key)} must be finite")
        if self.spread < 0:
            raise ValueError(f"{self.name}: spread={self.spread} must not be negative; give a standard deviation")

    @property
    def verdict(self) -> bool:
        """Whether the number found bears the statement out."""
        return COMPARISONS[self.comparison](self.quantity, self.bound)

    @property
    def margin(self) -> float | None:
        """Distance to the bound in spreads, negative where the claim fails; None without a spread."""
        if not self.spread:
            return None
        distance = abs(self.quantity - self.bound) / self.spread
        return distance if self.verdict else -distance

    @property
    def close(self) -> bool:
        """Whether the number is within ``CLOSE`` spreads of its bound, on either side."""
        return self.margin is not None and abs(self.margin) < CLOSE

    @property
    def words(self) -> str:
        """The verdict as a reader is told it: "holds", "holds, near its bound" or "fails"."""
        return "fails" if not self.verdict else "holds, near its bound" if self.close else "holds"


@dataclass(frozen=True)
class Verdicts:
    """Claims as a table for readers, in a notebook as HTML: whole statements, margins in spreads, verdicts in words."""

    claims: Sequence[Claim]

    def frame(self) -> pd.DataFrame:
        """The table as text: one row a claim; a dash where there is no spread to measure a margin in."""
        return pd.DataFrame(
            {
                "claim": [claim.statement for claim in self.claims],
                "found": [f"{claim.quantity:.3g}" for claim in self.claims],
                "bound": [f"{claim.comparison} {claim.bound:.3g}" for claim in self.claims],
                "margin, spreads": ["–" if c.margin is None else f"{c.margin:.1f}" for c in self.claims],
                "over": [claim.over or "–" for claim in self.claims],
                "verdict": [claim.words for claim in self.claims],
            }
        )

    def __repr__(self) -> str:
        return self.frame().to_string(index=False)

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            html = self.frame().to_html(index=False, justify="left")
        return html.replace("<td>", '<td align="left" style="text-align: left">')


class Results:
    """Collects what one notebook reports and writes it to the figures folder.

    Args:
        name: the notebook's name; files are ``NAME.json``, ``NAME_panel.pdf``, ``NAME_panel.png``, ``NAME_table.csv``,
            and ``NAME_claims.json`` if anything is claimed.
        settings: the notebook's parameters, kept beside the numbers they gave.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.name, self.settings = name, settings
        self.values: dict[str, Any] = {}
        self.claims: dict[str, Claim] = {}
        self.started = time.perf_counter()

    def record(self, **values: Any) -> None:
        """Keep numbers (or nested dicts and lists of them) under their names; a name is given once."""
        for key, value in values.items():
            if key in self.values:
                raise ValueError(f"{self.name}: {key!r} is recorded already")
            self.values[key] = plain(value)

    def claim(
        self, name: str, statement: str, quantity: float, comparison: str, bound: float, spread: float = 0.0,
        over: str = "",
    ) -> Claim:  # fmt: skip
        """Keep a claim, true or not, under its name; a name is given once."""
        if name in self.claims:
            raise ValueError(f"{self.name}: {name!r} is claimed already")
        self.claims[name] = Claim(name, statement, float(quantity), comparison, float(bound), float(spread), over)
        return self.claims[name]

    def verdicts(self) -> Verdicts:
        """The claims so far, to be shown by a notebook."""
        return Verdicts(list(self.claims.values()))

    def figure(self, panel: str, figure: Figure) -> None:
        """Write a figure as PDF and PNG, the same bytes every time."""
        stem = folder() / f"{self.name}_{panel}"
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
        figure.savefig(stem.with_suffix(".png"), dpi=200)
        plt.show()

    def table(self, panel: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Write a table as CSV and hand it back for display."""
        frame.to_csv(folder() / f"{self.name}_{panel}.csv", index=False, float_format="%.6g")
        return frame

    def write(self) -> Path:
        """Write NAME.json with settings, versions and wall time, and NAME_claims.json beside it."""
        path = folder() / f"{self.name}.json"
        content = {
            "name": self.name,
            "profile": profile(),
            "settings": plain(self.settings),
            "results": self.values,
            "versions": versions(),
            "wall_seconds": round(time.perf_counter() - self.started, 1),
        }
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        claims = folder() / f"{self.name}_claims.json"
        claims.unlink(missing_ok=True)  # an earlier run may have claimed what this one does not
        if self.claims:
            claims.write_text(json.dumps(plain([told(claim) for claim in self.claims.values()]), indent=1) + "\n")
        return path


def told(claim: Claim) -> dict[str, Any]:
    """A claim with what follows from it, as it is written."""
    return asdict(claim) | {"verdict": claim.verdict, "margin": claim.margin, "close": claim.close}


def versions() -> dict[str, Any]:
    """What numbers hang on besides the code: packages, the processor's name and the kernels chosen for it."""
    kernels = {"torch": torch.backends.cpu.get_cpu_capability()}
    kernels |= {name: os.environ[name] for name in KERNELS if name in os.environ}
    kernels |= {name: str(on) for name, on in (("mkl", torch.backends.mkl.is_available()),
                                               ("onednn", torch.backends.mkldnn.is_available()))}  # fmt: skip
    packages = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    return packages | {"processor": processor(), "kernels": kernels}


def processor() -> str:
    """The processor's name as the system tells it; its architecture where it does not."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def spread(values: Sequence[float] | torch.Tensor) -> dict[str, Any]:
    """Mean, standard deviation over seeds (n − 1), least, largest and the values themselves."""
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    return {
        "mean": x.mean().item(),
        "sd": x.std().item() if len(x) > 1 else 0.0,
        "min": x.min().item(),
        "max": x.max().item(),
        "values": x.tolist(),
    }


def error_of_mean(values: Sequence[float] | torch.Tensor) -> float:
    """The standard error of the mean of values from independent fits; 0 for a single one."""
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    return x.std().item() / len(x) ** 0.5 if len(x) > 1 else 0.0


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts only, to six significant digits; NaN and infinity are refused."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a result that can be reported")
        return float(f"{value:.6g}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ValueError(f"{type(value).__name__} is not a result that can be reported")
