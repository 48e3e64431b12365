"""Where results go, and the JSON that the paper reads its numbers from."""

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure

PACKAGES = ("torch", "numpy", "matplotlib", "eigendecomp")


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


class Results:
    """Collects what one notebook reports and writes it to the figures folder.

    Args:
        name: the notebook's name; files are ``NAME.json``, ``NAME_panel.pdf``, ``NAME_panel.png``, ``NAME_table.csv``.
        settings: the notebook's parameters, kept beside the numbers they gave.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.name, self.settings = name, settings
        self.values: dict[str, Any] = {}
        self.started = time.perf_counter()

    def record(self, **values: Any) -> None:
        """Keep numbers (or nested dicts and lists of them) under their names; a name is given once."""
        for key, value in values.items():
            if key in self.values:
                raise ValueError(f"{self.name}: {key!r} is recorded already")
            self.values[key] = plain(value)

    def figure(self, panel: str, figure: Figure) -> None:
        """Write a figure as PDF and PNG, the same bytes every time."""
        stem = folder() / f"{self.name}_{panel}"
        figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
        figure.savefig(stem.with_suffix(".png"), dpi=200)
        plt.show()

    def table(self, panel: str, rows: pd.DataFrame) -> pd.DataFrame:
        """Write a table as CSV and hand it back for display."""
        rows.to_csv(folder() / f"{self.name}_{panel}.csv", index=False, float_format="%.6g")
        return rows

    def write(self) -> Path:
        """Write NAME.json with settings, versions and wall time."""
        path = folder() / f"{self.name}.json"
        content = {
            "name": self.name,
            "profile": profile(),
            "settings": plain(self.settings),
            "results": self.values,
            "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
            "wall_seconds": round(time.perf_counter() - self.started, 1),
        }
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path


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
