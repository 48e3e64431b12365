"""Whether a new run says the same as the committed one: its claims, then its numbers, figures/*.json and *.csv.

    python notebooks/tools/verify.py [--base HEAD] [--rtol 1e-2] [--atol 1e-6]

Failures, for which it exits with 1: a claim of the paper, or of a NAME_claims.json, whose verdict changed; a file or
a key that is gone. Warnings: a claim that was committed as near its bound and whose verdict changed; a number that
moved by more than its spread (the sd beside it), or more than atol + rtol * |old|; text, true or false that changed; a
list of another length; and, where processor, kernels and torch are the recorded ones, any number that moved at all. One
line counts the rest. Entries that describe the run instead of the result are passed over: a key or a column that holds
one of the words of RUN between underscores or spaces, with all that is under it, and the tables of TIMES.
"""

import argparse
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typst

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "second|seconds|minutes|hours|time|times|timestamp|date|speedup|throughput|memory|rss|version|versions|commit"
    "|machine|platform|device|threads"
)
TIMES = ("cost_steps.csv", "cost_choices.csv")
SPREADS = ("sd", "std", "spread")
SUMMARIES = ("mean", "median", "min", "max", "values", "quantity", *SPREADS)  # what a spread beside them is of
SHOWN = 20
Claims = dict[str, tuple[bool, str]]  # by what is claimed: whether it holds, and what was found
NEAR = "near its bound"


@dataclass
class Differences:
    """What two runs do not have in common: failures, warnings, and counts of what moved no further than it may."""

    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    within: int = 0
    equal: int = 0

    def add(self, other: "Differences") -> None:
        self.failures += other.failures
        self.warnings += other.warnings
        self.within, self.equal = self.within + other.within, self.equal + other.equal


# ---- numbers


def of_run(key: object) -> bool:
    """Whether a key describes the run instead of the result."""
    return re.search(rf"(?:^|[_ ])(?:{RUN})(?:[_ ]|$)", str(key).lower()) is not None


def flatten(value: object, key: str = "", spread: float = 0.0) -> Iterator[tuple[str, object, float]]:
    """Every leaf of nested results with its dotted key and its spread, and every list's length; nothing of the run."""
    if isinstance(value, dict):
        for name in (name for name in value if not of_run(name)):
            yield from flatten(value[name], f"{key}.{name}" if key else str(name), stated(value, str(name)))
    elif isinstance(value, list):
        yield f"{key}[]", len(value), 0.0
        for index, item in enumerate(value):
            yield from flatten(item, f"{key}[{index}]", spread)
    else:
        yield key, value, spread


def stated(siblings: dict[str, Any], name: str) -> float:
    """The spread of an entry that stands beside it: ``sd`` beside ``mean``, ``x sd`` or ``x_sd`` beside ``x``."""
    names = [name + mark + word for word in SPREADS for mark in (" ", "_")]
    found = [siblings.get(key) for key in [*names, *(SPREADS if name in SUMMARIES else ())]]
    return max((float(x) for x in found if is_number(x) and math.isfinite(x)), default=0.0)


def is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


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


def equal(old: object, new: object) -> bool:
    """Bit for bit, with NaN equal to itself."""
    return old == new or (old != old and new != new)


def allowed(old: Any, new: Any, tolerance: float) -> bool:
    """Whether a number moved no further than it may."""
    return is_number(old) and is_number(new) and abs(new - old) <= tolerance  # never so with NaN


def compare(old: object, new: object, rtol: float = 1e-2, atol: float = 1e-6, exact: bool = False) -> Differences:
    """What moved between two results; ``exact``: on the same kind of processor, where nothing has to move."""
    before = {key: (value, spread) for key, value, spread in flatten(old)}
    after = {key: value for key, value, _ in flatten(new)}
    found, others = Differences(), [] if exact else list(chosen_otherwise(old, new))
    found.warnings += [f"{key}: {lost}, now {gained}" for key, lost, gained in others]
    apart = tuple(f"{key}.{name}."[not key :] for key, *both in others for names in both for name in names)
    for key, (value, spread) in before.items():
        if key not in after:
            if not shortened(key, after) and not f"{key}.".startswith(apart):
                found.failures.append(f"{key}: {value!r}, now missing")
        elif equal(value, after[key]):
            found.equal += 1
        elif key.endswith("[]"):
            found.warnings.append(f"{key[:-2]}: {value} entries, now {after[key]}")
        else:
            size = abs(value) if is_number(value) else 0.0  # pyright: ignore[reportArgumentType]
            within = allowed(value, after[key], max(spread, atol + rtol * size))
            found.within += within and not exact
            if exact or not within:
                found.warnings.append(f"{key}: {value!r}, now {after[key]!r}")
    values = {key: value for key, (value, _) in before.items()}
    found.warnings += [
        f"{key}: new, {after[key]!r}"
        for key in after
        if key not in before and not shortened(key, values) and not f"{key}.".startswith(apart)
    ]
    return found


def chosen_otherwise(old: object, new: object, key: str = "") -> Iterator[tuple[str, list[str], list[str]]]:
    """Where results are named by what they chose (concepts, say), and as many others were chosen: the names of both."""
    if isinstance(old, dict) and isinstance(new, dict):
        lost, gained = ([str(name) for name in a if name not in b] for a, b in ((old, new), (new, old)))
        if lost and len(lost) == len(gained):
            yield key, lost, gained
        for name in old:
            if name in new:
                yield from chosen_otherwise(old[name], new[name], f"{key}.{name}" if key else str(name))
    elif isinstance(old, list) and isinstance(new, list):
        for index, (one, other) in enumerate(zip(old, new, strict=False)):
            yield from chosen_otherwise(one, other, f"{key}[{index}]")


def shortened(key: str, other: dict[str, Any]) -> bool:
    """Whether an entry lies past the end of a list that is there: the list's length tells it already."""
    places = re.finditer(r"\[(\d+)\]", key)
    lengths = ((int(place[1]), other.get(f"{key[: place.start()]}[]")) for place in places)
    return any(length is not None and index >= length for index, length in lengths)


# ---- claims


def of_paper(root: Path) -> Claims:
    """The claims of the paper in a folder that holds it and its results.

    Raises:
        RuntimeError: if a file or a key that the text needs is missing.
    """
    main = str(root / "paper" / "main.typ")
    found = json.loads(typst.query(main, "<claim>", root=str(root), ignore_system_fonts=True))
    claims: Claims = {}
    for claim in (item["value"] for item in found):
        holds, words = claims.get(claim["name"], (True, ""))
        if holds:  # one that is made twice holds if it does both times
            words = f"{claim['found']!r} {claim['relation']} {claim['bound']!r}"
        claims[claim["name"]] = holds and claim["holds"], words
    return claims


def of_file(content: Any) -> Claims:
    """The claims of a NAME_claims.json; of one within two spreads of its bound, the words say so."""
    return {
        x["name"]: (
            x["verdict"],
            f"{x['quantity']!r} {x['comparison']} {x['bound']!r}" + (f", {NEAR}" if x.get("close") else ""),
        )
        for x in content
    }


def changed(old: Claims, new: Claims) -> list[str]:
    """One line for each claim that is gone or whose verdict is another."""
    words = {True: "held", False: "failed"}
    gone = [f"no longer claimed: {name}" for name in old if name not in new]
    return gone + [
        f"{words[old[name][0]]} ({old[name][1]}), now {'holds' if holds else 'fails'} ({found}): {name}"
        for name, (holds, found) in new.items()
        if name in old and holds != old[name][0]
    ]


def paper(base: Path) -> Differences:
    """The paper's claims on the committed results and on the new ones; the text is the new one both times."""
    if not (ROOT / "paper" / "main.typ").exists():
        return Differences()
    shutil.copytree(ROOT / "paper", base / "paper")
    claims: list[Claims] = []
    for root, whose in ((base, "committed"), (ROOT, "new")):
        try:
            claims.append(of_paper(root))
        except RuntimeError as error:  # of which typst.TypstError is one; a query raises its own kind
            return Differences([f"the paper cannot be built from the {whose} results: {error}"])
    print(f"the paper's claims: {len(claims[1])}, of which {sum(holds for holds, _ in claims[1].values())} hold")
    return Differences([f"claim {line}" for line in changed(*claims)])


# ---- files


def results(folder: Path) -> dict[str, Path]:
    """The results files and tables of a folder by name."""
    paths = [*folder.glob("*.json"), *folder.glob("*.csv")]
    return {path.name: path for path in sorted(paths) if path.name not in TIMES}


def kind(folder: Path, name: str) -> tuple[Any, ...] | None:
    """Processor, kernels and torch that a file's numbers were computed with; None if that was not recorded."""
    path = folder / (re.split(r"[_.]", name)[0] + ".json")
    own = folder / name
    path = own if own.suffix == ".json" and not name.endswith("_claims.json") else path
    content = json.loads(path.read_text()) if path.exists() else {}
    versions = content.get("versions", {}) if isinstance(content, dict) else {}
    found = tuple(versions.get(key) for key in ("processor", "kernels", "torch"))
    return None if None in found else found


def files(base: Path, new: Path, rtol: float, atol: float) -> Differences:
    """Every results file and table of two folders of figures."""
    committed, here, found, kinds = results(base), results(new), Differences(), set[str]()
    for name, path in committed.items():
        if name not in here:
            found.failures.append(f"{name}: missing")
            continue
        old, now = read(path.read_text(), name), read(here[name].read_text(), name)
        before, after = kind(base, name), kind(new, name)
        known = before is not None and after is not None
        kinds.add(("the recorded one" if before == after else "another") if known else "not known")
        one = compare(old, now, rtol, atol, exact=known and before == after)
        if name.endswith("_claims.json"):
            claims = of_file(old)
            near = {name: claim for name, claim in claims.items() if claim[1].endswith(NEAR)}
            firm = {name: claim for name, claim in claims.items() if name not in near}
            one.failures = [f"claim {line}" for line in changed(firm, of_file(now))]
            one.warnings += [f"claim {line}" for line in changed(near, of_file(now))]
        found.failures += [f"{name}: {line}" for line in one.failures]
        found.warnings += [f"{name}: {line}" for line in one.warnings]
        found.add(Differences(within=one.within, equal=one.equal))
    for name in sorted(here.keys() - committed.keys()):
        found.warnings.append(f"{name}: not committed, nothing to compare it with")
    print(f"kind of processor: {' or '.join(sorted(kinds)) or 'not known'}; files compared: {len(committed)}")
    return found


def extract(base: str, folder: Path) -> None:
    """Put the committed figures of a commit in a folder."""
    command = ["git", "archive", "--format=tar", base, "figures"]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def report(found: Differences) -> None:
    """Failures, the first warnings, and one line on everything else."""
    for line in found.failures:
        print(f"FAILURE {line}")
    for line in found.warnings[:SHOWN]:
        print(f"warning {line}")
    if len(found.warnings) > SHOWN:
        print(f"warning … and {len(found.warnings) - SHOWN} more")
    moved = f"{found.within} moved within their spreads or tolerances, " if found.within else ""
    print(f"everything else: {moved}{found.equal} entries are the same bit for bit")


def main() -> None:
    """Compare the results of the working tree with those of the base commit."""
    parser = argparse.ArgumentParser(description="Whether a new run says the same as the committed one.")
    parser.add_argument("--base", default="HEAD", help="the commit to compare with (%(default)s)")
    parser.add_argument("--rtol", type=float, default=1e-2, help="relative tolerance (%(default)s)")
    parser.add_argument("--atol", type=float, default=1e-6, help="absolute tolerance (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        extract(arguments.base, Path(folder))
        found = paper(Path(folder))
        found.add(files(Path(folder) / "figures", ROOT / "figures", arguments.rtol, arguments.atol))
    report(found)
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
