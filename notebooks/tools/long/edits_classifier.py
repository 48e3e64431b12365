"""The edits of the classifier behind the notebook `edits`: behaviours by methods, numbers of examples and seeds.

    python notebooks/tools/long/edits_classifier.py [--minutes M]

Needs Fashion-MNIST, which `make figures` fetches. Settings are chosen first, on seed 100 and two behaviours that are
not scored, and go to data/runs/edits_classifier_tuning.csv. Rows are written to data/runs/edits_classifier.csv as they
come; those that are there already are not made again, so that the command may be stopped and given again.
"""

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # of libraries
sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

import pandas as pd
import torch

from rooms.edits import classifier

RUNS = Path(__file__).resolve().parents[3] / "data" / "runs"
TUNING_SEED, TUNING_EXAMPLES = 100, 10
COUNTS, SEEDS = (10, 1), (0, 1, 2)


def settings_of(shop: classifier.Shop, path: Path) -> dict[str, dict[str, float]]:
    """Settings, from the file where it is there."""
    if not path.exists():
        settings, tried = classifier.tuned(shop, TUNING_EXAMPLES)
        rows = [json.dumps(row) for row in [*tried, {"chosen": settings}]]
        pd.DataFrame({"setting": rows}).to_csv(path, index=False)
    return json.loads(pd.read_csv(path)["setting"].iloc[-1])["chosen"]


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description="Edits of the classifier, one row a behaviour, method, size and seed.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    end = time.monotonic() + 60 * parser.parse_args().minutes
    torch.set_num_threads(1)
    path, shop = RUNS / "edits_classifier.csv", classifier.Shop(TUNING_SEED)
    settings = settings_of(shop, RUNS / "edits_classifier_tuning.csv")
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["behaviour", "examples", "seed"])
    for n, seed, name in itertools.product(COUNTS, SEEDS, classifier.scored(shop)):
        if ((rows.behaviour == name) & (rows.examples == n) & (rows.seed == seed)).any():
            continue
        if time.monotonic() > end:
            sys.exit("stopped: the minutes are over; the same command goes on")
        if shop.seed != seed:
            shop = shop.reseeded(seed)
        task = classifier.Task(shop, name, n)
        found = [classifier.one(task, method, "test", **setting) for method, setting in settings.items()]
        rows = pd.concat([rows, pd.DataFrame(found)])
        rows.to_csv(path, index=False, float_format="%.5g")
        print(seed, n, name, flush=True)


if __name__ == "__main__":
    main()
