"""Compare the numbers of a new run, figures/*.json and *.csv, with the committed ones, and list what moved.

    python notebooks/tools/verify.py [--base HEAD] [--rtol 1e-2] [--atol 1e-6]

A number has moved if |new - old| > atol + rtol * |old|; text, true and false must be equal, and the same keys
must be there. Torch promises equal results only on one version and one kind of processor, hence 1%. Entries
that describe the run instead of the result are passed over: a key or a column that holds one of the words of RUN
between underscores or spaces, with all that is under it, and the tables of TIMES. Exits with 1 if anything moved.
"""

import argparse
import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "second|seconds|minutes|hours|time|times|timestamp|date|speedup|throughput|memory|rss|version|versions|commit"
    "|machine|platform|device|threads"
)
TIMES = ("cost_steps.csv", "cost_choices.csv")


def flatten(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested results with its dotted key, without what describes the run."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not re.search(rf"(?:^|[_ ])(?:{RUN})(?:[_ ]|$)", str(name).lower()):
                yield from flatten(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from flatten(item, f"{key}[{index}]")
    else:
        yield key, value


def read(text: str, name: str) -> object:
    """What is in a results file, or the rows of a table, with its numbers as numbers."""
    if name.endswith(".json"):
        return json.loads(text)
    return [{key: number(entry) for key, entry in row.items()} for row in csv.DictReader(io.StringIO(text))]


def number(entry: str) -> float | str:
    try:
        return float(entry)
    except ValueError:
        return entry


def same(old: object, new: object, rtol: float, atol: float) -> bool:
    """Whether one entry is what it was, within the tolerances if it is a number."""
    numbers = [x for x in (old, new) if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(numbers) < 2:
        return old == new
    before, after = numbers
    if not (math.isfinite(before) and math.isfinite(after)):
        return before == after or (math.isnan(before) and math.isnan(after))
    return abs(after - before) <= atol + rtol * abs(before)


def moved(old: object, new: object, rtol: float = 1e-2, atol: float = 1e-6) -> list[str]:
    """One line for each entry that is outside the tolerances, gone or new."""
    before, after = dict(flatten(old)), dict(flatten(new))
    lines = [f"{key}: {before[key]!r}, now missing" for key in before if key not in after]
    lines += [f"{key}: new, {after[key]!r}" for key in after if key not in before]
    for key in before:
        if key in after and not same(before[key], after[key], rtol, atol):
            lines.append(f"{key}: {before[key]!r}, now {after[key]!r}")
    return lines


def git(*arguments: str) -> str:
    """The output of a git command in the repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Compare every results file and table of the working tree and of the base commit."""
    parser = argparse.ArgumentParser(description="Compare the numbers of a new run with the committed ones.")
    parser.add_argument("--base", default="HEAD", help="the commit to compare with (%(default)s)")
    parser.add_argument("--rtol", type=float, default=1e-2, help="relative tolerance (%(default)s)")
    parser.add_argument("--atol", type=float, default=1e-6, help="absolute tolerance (%(default)s)")
    arguments = parser.parse_args()
    committed = {
        Path(path).name: path
        for path in git("ls-tree", "-r", "--name-only", arguments.base, "figures/").splitlines()
        if path.endswith((".json", ".csv")) and Path(path).name not in TIMES
    }
    found = [*(ROOT / "figures").glob("*.json"), *(ROOT / "figures").glob("*.csv")]
    here = {path.name: path for path in found if path.name not in TIMES}
    failures = compared = 0
    for name in sorted({*committed, *here}):
        if name not in committed:
            print(f"{name}: not in {arguments.base}, nothing to compare it with")
            continue
        old = read(git("show", f"{arguments.base}:{committed[name]}"), name)
        if name in here:
            lines = moved(old, read(here[name].read_text(), name), arguments.rtol, arguments.atol)
        else:
            lines = ["missing"]
        entries = len(dict(flatten(old)))
        print("\n".join(f"{name}: {line}" for line in lines) or f"{name}: {entries} entries agree")
        failures, compared = failures + len(lines), compared + 1
    print(
        f"files compared with {arguments.base}: {compared}, entries that moved: {failures} "
        f"(relative tolerance {arguments.rtol:g}, absolute {arguments.atol:g})"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
