"""Costs of edits beside those of one direction: paired over cases, with intervals over behaviours and seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

OURS = "one direction"


def geometric(values: Any) -> float:
    """The geometric mean of what is there; NaN where nothing is."""
    present = pd.Series(values, dtype=float).dropna()
    return float(np.exp(np.log(present).mean())) if len(present) else float("nan")


def log_ratios(rows: pd.DataFrame, method: str, other: str = OURS, value: str = "damage") -> pd.DataFrame:
    """ln(cost of a method / cost of another), behaviours by seeds; NaN where either did not reach its level."""
    table: Any = rows.pivot_table(index=["behaviour", "seed"], columns="method", values=value, dropna=False)
    if method not in table or other not in table:
        return pd.DataFrame()
    return np.log(table[method] / table[other]).unstack("seed")


def ratio(
    rows: pd.DataFrame, method: str, other: str = OURS, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The mean log ratio and its 95% interval, drawing behaviours and seeds anew, each among themselves."""
    logs = log_ratios(rows, method, other).to_numpy(dtype=float)
    if not np.isfinite(logs).any():
        return float("nan"), float("nan"), float("nan")
    draw, (n, m) = np.random.default_rng(seed), logs.shape
    rows_of, seeds_of = draw.integers(n, size=(draws, n, 1)), draw.integers(m, size=(draws, 1, m))
    some = logs[rows_of, seeds_of].reshape(draws, -1)
    there = np.isfinite(some)
    counts = there.sum(1)  # none where a draw meets only cases that failed
    means = np.where(there, some, 0).sum(1)[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.nanmean(logs)), float(low), float(high)


def best_in(rows: pd.DataFrame) -> dict[str, int]:
    """In how many behaviours each method costs least, in the geometric mean over the seeds in which it is there."""
    by: Any = rows.dropna(subset=["damage"]).groupby(["behaviour", "method"])["damage"].apply(geometric).unstack()
    return by.idxmin(axis=1).value_counts().to_dict()


def compared(rows: pd.DataFrame, *, draws: int = 2000, damages: Sequence[str] = ("damage", "worst")) -> pd.DataFrame:
    """A line a method, the cheapest first: its costs, the paired ratio to one direction, reached, seconds and bytes.

    ``cost`` is the ratio over the cases that both reach; the other costs are means over all that the method reaches.
    """
    lines, best = [], best_in(rows)
    for method, some in rows.groupby("method", sort=False):
        middle, low, high = np.exp(ratio(rows, str(method), draws=draws))
        line = {"method": method, "cost": middle, "low": low, "high": high}
        line |= {name: geometric(some[name]) for name in damages}
        line |= {"best_in": best.get(str(method), 0), "reached": int(some["damage"].notna().sum()), "of": len(some)}
        lines.append(line | {"seconds": some["seconds"].median(), "bytes": int(some["bytes"].iloc[0])})
    return pd.DataFrame(lines).sort_values("cost", ignore_index=True)


def by_examples(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Geometric mean cost by method and number of examples, over the cases that have all numbers, and how many."""
    counts = rows.groupby(["seed", "behaviour"])["examples"].nunique()
    full = counts[counts == counts.max()].index
    some = rows.set_index(["seed", "behaviour"]).loc[full]
    return some.groupby(["method", "examples"])["damage"].apply(geometric).unstack(), len(full)


def records(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """A table's lines by method, as they are recorded; what is not there is left out."""
    lines = table.set_index("method").to_dict("index")
    return {str(method): {k: v for k, v in line.items() if v == v} for method, line in lines.items()}
