"""What two processes that share batches do beside one that works alone, on two idle cores: data/runs/processes.json.

    python notebooks/tools/long/processes.py [--out data/runs/processes.json]

A file that is there already is left as it is; one made with other settings is refused. ``make long`` runs it, in two
minutes of two cores. In every round one process fits alone, then two share batches twice as large, then two that know
nothing of each other fit at the same time; each is started anew. Seconds are those of a step, by the clock.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

from rooms import kept_rows
from rooms.cost.benchmark import fit_alone

ROOT = Path(__file__).resolve().parents[3]
SETTINGS: dict[str, Any] = {
    "vocabulary": 512, "width": 128, "layers": 2, "directions": 100, "samples": [256, 512], "steps": 8, "rounds": 3,
}  # fmt: skip


def one_round(s: dict[str, Any]) -> list[dict[str, float]]:
    """For every number of samples a process: seconds of a step alone, by two together, and by each of two apart."""
    network, samples = (s["vocabulary"], s["width"], s["layers"], s["directions"]), s["samples"]
    alone, shared = (fit_alone(*network, [p * n for n in samples], s["steps"], processes=p) for p in (1, 2))
    with ThreadPoolExecutor(2) as pool:
        apart = list(pool.map(lambda _: fit_alone(*network, samples, s["steps"])["step_seconds"], range(2)))
    taken = zip(samples, alone["step_seconds"], shared["step_seconds"], *apart, strict=True)
    return [{"samples": n, "one": one, "two": two, "apart": sum(rest) / 2} for n, one, two, *rest in taken]


def all_rounds(s: dict[str, Any]) -> list[dict[str, float]]:
    """The rows of every round."""
    return [row for _ in range(s["rounds"]) for row in one_round(s)]


def main() -> None:
    """Make the file if it is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "runs" / "processes.json")
    out: Path = parser.parse_args().out
    kept_rows.once(out, SETTINGS, "notebooks/tools/long/processes.py", lambda: {"rounds": all_rounds(SETTINGS)})


if __name__ == "__main__":
    main()
