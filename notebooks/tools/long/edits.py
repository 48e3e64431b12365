"""The fits and edits behind the notebook `edits`: behaviours by methods, numbers of examples and seeds.

    python notebooks/tools/long/edits.py [--layer 7] [--minutes M] [--methods …] [--examples …]

Settings are chosen first, on seed 100 and two behaviours that are not scored, and go to data/runs/edits_tuning.csv.
Rows are written to data/runs/edits.csv as they come; those that are there already are not made again, so that the
command may be stopped and given again. All of it is about a quarter of an hour of one core.
"""

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

warnings.filterwarnings("ignore")  # of libraries
sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

import pandas as pd

from rooms.edits import behaviours, editing

RUNS = Path(__file__).resolve().parents[3] / "data" / "runs"
TUNING_SEED, TUNING_EXAMPLES = 100, 10
KEYS = ("behaviour", "method", "examples", "layer", "seed")
COUNTS, SEEDS = (10, 1, 100), (0, 1, 2)


def chosen(shop: editing.Workshop, path: Path, methods: Sequence[str]) -> editing.Choice:
    """Settings, from the file where they are there; those of methods that it does not know are added."""
    before = None
    if path.exists():
        rows = [json.loads(row) for row in pd.read_csv(path)["setting"]]
        before = editing.Choice(*rows[-1]["chosen"], tried=rows[:-1])
    if before is None or (set(methods) & {*editing.MADE_OF, *editing.GRID}) - set(before.settings):
        choice = editing.tuned(shop, TUNING_EXAMPLES, before, methods)
        rows = [*choice.tried, {"chosen": [choice.sizes, choice.settings]}]
        pd.DataFrame({"layer": shop.layer, "setting": [json.dumps(row) for row in rows]}).to_csv(path, index=False)
        before = choice
    return before


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description="The benchmark of edits, one row a behaviour, method, size and seed.")
    parser.add_argument("--layer", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--methods", nargs="*", default=editing.METHODS, help="these alone")
    parser.add_argument("--examples", nargs="*", type=int, default=COUNTS)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    RUNS.mkdir(exist_ok=True)
    path = RUNS / "edits.csv"
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(KEYS))
    tuning = editing.Workshop(arguments.layer, TUNING_SEED)
    choice = chosen(tuning, RUNS / "edits_tuning.csv", arguments.methods)
    for seed, n, name in itertools.product(SEEDS, arguments.examples, behaviours.SCORED):
        done = rows[(rows.behaviour == name) & (rows.examples == n) & (rows.seed == seed)]
        missing = [m for m in arguments.methods if m not in set(done[done.layer == arguments.layer].method)]
        if not missing:
            continue
        if time.monotonic() > end:
            sys.exit("stopped: the minutes are over; the same command goes on")
        if tuning.seed != seed:
            tuning = tuning.reseeded(seed, choice.sizes)
        rows = pd.concat([rows, pd.DataFrame(editing.compare(tuning, choice, [name], n, missing))])
        rows.to_csv(path, index=False, float_format="%.5g")
        print(seed, n, name, flush=True)


if __name__ == "__main__":
    main()
