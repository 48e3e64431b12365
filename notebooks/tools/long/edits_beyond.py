"""The edits behind the notebook `edits` on other targets: residual networks, memorised text, the classifier.

    python notebooks/tools/long/edits_beyond.py [residual] [memorised] [classifier] [--minutes M]

Settings are chosen first, on networks, sets of stories or behaviours that are not scored, and go to
data/runs/edits_TARGET_tuning.csv. Rows are written to data/runs/edits_TARGET.csv as they come; those that are there
already are not made again, so that the command may be stopped and given again.
"""

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # of libraries
sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

import pandas as pd
import torch

from rooms.edits import classifier, memorised, residual

RUNS = Path(__file__).resolve().parents[3] / "data" / "runs"
TUNING_SEED = 100
Settings = dict[str, dict[str, float]]
Tried = list[dict[str, Any]]
Rows = list[dict[str, Any]]
Case = dict[str, Any]


def settings_of(target: str, choose: Callable[[], tuple[Settings, Tried]]) -> Settings:
    """Settings, from the file where it is there."""
    path = RUNS / f"edits_{target}_tuning.csv"
    if not path.exists():
        settings, tried = choose()
        rows = [json.dumps(row) for row in [*tried, {"chosen": settings}]]
        pd.DataFrame({"setting": rows}).to_csv(path, index=False)
    return json.loads(pd.read_csv(path)["setting"].iloc[-1])["chosen"]


def on_residual() -> Iterator[tuple[Case, Callable[[], Rows]]]:
    """Features of three networks of three layers; from ten examples, then from one and from a hundred."""
    settings = settings_of("residual", lambda: residual.tuned(residual.Network(3, TUNING_SEED)))
    made: dict[tuple[int, int], residual.Network] = {}

    def network(layers: int, seed: int) -> residual.Network:
        kept = settings["SAE unit, one layer"]["kept"]
        return made.setdefault((layers, seed), residual.Network(layers, seed, kept=kept))

    def rows(layers: int, seed: int, feature: int, n: int, level: float) -> Rows:
        return residual.compare(residual.Task(network(layers, seed), feature, n, level), settings)

    for seed, (n, level) in itertools.product((0, 1, 2), ((10, 0.25), (10, 0.04), (1, 0.25), (100, 0.25))):
        for feature in range(5, 100, 17):
            case = {"layers": 3, "seed": seed, "behaviour": feature, "examples": n, "level": level}
            yield case, lambda case=case: rows(*case.values())


def on_memorised() -> Iterator[tuple[Case, Callable[[], Rows]]]:
    """Sets of stories, each learned by heart by a copy of its own."""

    def choose() -> tuple[Settings, Tried]:
        return memorised.tuned({TUNING_SEED: bench(TUNING_SEED)})

    def bench(seed: int) -> memorised.Bench:
        return memorised.Bench(memorised.Overtrained(seed, memorised.LAYER))

    settings = settings_of("memorised", choose)

    def rows(seed: int) -> Rows:
        made = bench(seed)
        found = [memorised.one(made, method, **setting) for method, setting in settings.items()]
        before = memorised.before(made)
        return [row | {f"copy_{name}": value for name, value in before.items()} for row in found]

    for seed in range(6):
        yield {"seed": seed}, lambda seed=seed: rows(seed)


def on_classifier() -> Iterator[tuple[Case, Callable[[], Rows]]]:
    """Behaviours of the classifier, by seed and number of examples."""
    shop = classifier.Shop(TUNING_SEED)
    settings = settings_of("classifier", lambda: classifier.tuned(shop, 10))
    shops: dict[int, classifier.Shop] = {}

    def rows(seed: int, name: str, n: int) -> Rows:
        task = classifier.Task(shops.setdefault(seed, shop.reseeded(seed)), name, n)
        return [classifier.one(task, method, "test", **setting) for method, setting in settings.items()]

    for seed, n in ((0, 10), (1, 10), (2, 10), (0, 1), (1, 1), (2, 1)):
        for name in classifier.scored(shop):
            case = {"seed": seed, "behaviour": name, "examples": n}
            yield case, lambda case=case: rows(case["seed"], case["behaviour"], case["examples"])


TARGETS = {"residual": on_residual, "memorised": on_memorised, "classifier": on_classifier}


def make_rows(target: str, end: float) -> None:
    """Make the rows of a target that are not there yet."""
    path = RUNS / f"edits_{target}.csv"
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame()
    for case, make in TARGETS[target]():
        if len(rows) and bool((rows[list(case)] == pd.Series(case)).all(axis=1).any()):
            continue
        if time.monotonic() > end:
            sys.exit("stopped: the minutes are over; the same command goes on")
        rows = pd.concat([rows, pd.DataFrame(make())])
        rows.to_csv(path, index=False, float_format="%.5g")
        print(case, flush=True)


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description="The benchmark of edits on targets beyond the story model.")
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)} (all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - TARGETS.keys():
        parser.error(f"{min(unknown)!r} is none of {', '.join(TARGETS)}")
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * arguments.minutes
    for target in arguments.targets:
        make_rows(target, end)


if __name__ == "__main__":
    main()
