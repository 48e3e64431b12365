"""The fits and edits behind the notebook `edits`: behaviours by methods, numbers of examples and seeds.

    python notebooks/tools/long/edits.py [--layer 7] [--minutes M]

Settings are chosen first, on seed 100 and two behaviours that are not scored, and go to data/runs/edits_tuning.csv.
Rows are written to data/runs/edits.csv as they come; those that are there already are not made again, so that the
command may be stopped and given again. All of it is about a quarter of an hour of one core.
"""

import argparse
import json
import math
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # of libraries
sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

import pandas as pd

from rooms.edits import behaviours, editing

RUNS = Path(__file__).resolve().parents[3] / "data" / "runs"
TUNING_SEED, TUNING_EXAMPLES = 100, 10
ORDER = ((0, 10), (1, 10), (0, 1), (0, 100), (2, 10), (1, 1), (1, 100), (2, 1), (2, 100))  # (seed, examples)


def chosen(shop: editing.Workshop, path: Path) -> editing.Choice:
    """Settings, from the file where they are there."""
    if not path.exists():
        choice = editing.tuned(shop, TUNING_EXAMPLES)
        rows = [{"layer": shop.layer, "setting": json.dumps(row)} for row in choice.tried]
        rows.append({"layer": shop.layer, "setting": json.dumps({"chosen": [choice.sizes, choice.settings]})})
        pd.DataFrame(rows).to_csv(path, index=False)
    last = json.loads(pd.read_csv(path)["setting"].iloc[-1])["chosen"]
    return editing.Choice(*last, tried=[])


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description="The benchmark of edits, one row a behaviour, method, size and seed.")
    parser.add_argument("--layer", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    RUNS.mkdir(exist_ok=True)
    path = RUNS / "edits.csv"
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame()
    done = set(zip(rows.behaviour, rows.examples, rows.layer, rows.seed)) if len(rows) else set()
    tuning = editing.Workshop(arguments.layer, TUNING_SEED)
    choice = chosen(tuning, RUNS / "edits_tuning.csv")
    shops: dict[int, editing.Workshop] = {}
    for seed, n in ORDER:
        for name in behaviours.SCORED:
            if (name, n, arguments.layer, seed) in done:
                continue
            if time.monotonic() > end:
                sys.exit("stopped: the minutes are over; the same command goes on")
            shop = shops.setdefault(seed, tuning.reseeded(seed, choice.sizes))
            rows = pd.concat([rows, pd.DataFrame(editing.compare(shop, choice, [name], n))])
            rows.to_csv(path, index=False, float_format="%.5g")
            print(seed, n, name, flush=True)


if __name__ == "__main__":
    main()
