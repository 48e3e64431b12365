"""The fits behind the notebook `tinystories`: units of many kinds at two sites, by size and seed.

    python notebooks/tools/long/stories.py [--minutes M] [--sizes 100 300]

For each size settings are chosen first, on one weight, seed 100 and validation stories (stories_tuning.csv).
Then every kind is fitted from three seeds, its units chosen on validation stories, and scored once on test stories:
concepts go to stories.csv, behaviours' gradients to stories_behaviours.csv. Rows are written as they come and those
that are there are not made again, so that the command may be stopped and given again. Files made with other settings
than those in stories.json are refused. It takes about two hours of one core.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # of libraries

import pandas as pd
import torch

from eigendecomp.report.results import versions
from eigendecomp.study import clusters
from eigendecomp.targets.stories import rivals
from eigendecomp.targets.stories.rivals import COUNTS, KINDS, SITES, Story, Units

RUNS = Path(__file__).resolve().parents[3] / "data" / "runs"
TUNING_SEED, SEEDS, SIZES = 100, (0, 1, 2), (100, 300, 1000)
KEPT = {"directions": (1, 2, 8), "SAE": (1, 2, 4, 8)}
STEPS = {"directions": (700, 2000), "SAE": (1200, 3000)}  # the second is tried at the least size, with the best kept
TUNED = "W_V"  # the weight on which settings are chosen, for both
OTHER: dict[str, list[dict[str, Any]]] = {
    "k-means of inputs": [{"restarts": 3}],
    "k-means of gradients": [{"signed": s, "by_input": b} for s in (True, False) for b in (True, False)],
    "training inputs": [{}], "random rows": [{}], "PCA": [{}],
}  # fmt: skip
SETTINGS = {
    "fit_windows": 1000, "held_windows": 256, "behaving_windows": 256, "length": 32, "seed_of_windows": 7,
    "kept": KEPT, "steps": STEPS, "other": OTHER, "counts": COUNTS, "two_on": 2, "tuning_seed": TUNING_SEED,
    "tuned_on": TUNED,
}  # fmt: skip
LABELS = {  # what is compared: its kind, and the readings among which validation stories choose
    "directions": ("directions", ("decoder", "encoder")),
    "SAE, code": ("SAE", ("code",)),
    "SAE, before its threshold": ("SAE", ("before its threshold",)),
    "SAE, decoder rows": ("SAE", ("decoder",)),
    "k-means of inputs": ("k-means of inputs", ("centre",)),
    "k-means of gradients": ("k-means of gradients", ("centre",)),
    "training inputs": ("training inputs", ("input",)),
    "random rows": ("random rows", ("row",)),
    "PCA": ("PCA", ("component",)),
}  # fmt: skip
FLOORS = ("training inputs", "random rows", "PCA")  # which are scored with all units alone
Row = dict[str, Any]


class File:
    """Rows of a CSV, written as they come."""

    def __init__(self, name: str) -> None:
        self.path = RUNS / f"{name}.csv"
        self.rows = pd.read_csv(self.path).to_dict("records") if self.path.exists() else []

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row[k] == v for k, v in key.items()) for row in self.rows)

    def add(self, rows: list[Row]) -> None:
        """Write some more."""
        self.rows += rows
        part = self.path.with_suffix(".partial")
        pd.DataFrame(self.rows).to_csv(part, index=False, float_format="%.4g")
        part.replace(self.path)


def means(story: Story, precision: torch.Tensor) -> Row:
    """The mean precision of either family."""
    known = story.known["test"]
    return {family: precision[known.of(family)].mean().item() for family in ("context", "prediction")}


def tried(story: Story, key: Row, setting: Row) -> list[Row]:
    """The rows of one setting, by reading, on validation stories alone."""
    units = KINDS[key["kind"]](story, key["weight"], key["size"], TUNING_SEED, setting)
    x = {"choose": story.site(key["weight"]).x["choose"]}
    held = float("nan")
    if units.writers is not None:
        shares = clusters.rebuilt(story.gradients["choose", key["weight"]], units.changes(), COUNTS)
        held = shares[COUNTS[1]].mean().item()
    return [key | {"setting": json.dumps(setting), "way": way, "held": held}
            | means(story, rivals.resolved(story, units.scores(way, x))[0]) for way in units.ways]  # fmt: skip


def tune(story: Story, file: File, size: int) -> None:
    """All settings of one size that are not in the file."""

    def run(kind: str, setting: Row) -> None:
        key = {"weight": TUNED, "size": size, "kind": kind}
        if not file.has(**key, setting=json.dumps(setting)):
            file.add(tried(story, key, setting))
            print("tuning", size, kind, setting, flush=True)

    for kind, settings in OTHER.items():
        for setting in settings:
            run(kind, setting)
    for kind, counts in KEPT.items():
        for kept in counts:
            run(kind, {"kept": kept, "steps": STEPS[kind][0]})
        label = "directions" if kind == "directions" else "SAE, before its threshold"
        if size == SIZES[0]:
            run(kind, json.loads(best_of(file, size, label)[0]) | {"steps": STEPS[kind][1]})


def best_of(file: File, size: int, label: str) -> tuple[str, str]:
    """The setting and the reading of a label with the best mean of both families on validation stories."""
    kind, ways = LABELS[label]
    rows = [row for row in file.rows if (row["size"], row["kind"]) == (size, kind) and row["way"] in ways]
    best = max(rows, key=lambda row: row["context"] + row["prediction"])
    return best["setting"], best["way"]


def best_held(file: File, size: int, kind: str) -> str:
    """The setting of a kind whose five rows hold most of validation stories' behaviours."""
    rows = [row for row in file.rows if (row["size"], row["kind"]) == (size, kind)]
    return max(rows, key=lambda row: row["held"])["setting"]


def chosen(file: File, size: int, kind: str) -> dict[str, tuple[str, str]]:
    """{label: (setting, reading)} of a kind."""
    return {label: best_of(file, size, label) for label, (of, _) in LABELS.items() if of == kind}


def scored(story: Story, units: Units, key: Row, label: str, setting: str, way: str) -> list[Row]:
    """The rows of one label: every concept on test stories, by all scores, and by the two largest of a token alone."""
    z = units.scores(way, {part: story.site(key["weight"]).x[part] for part in ("choose", "test")})
    return by_concept(story, z, key | {"label": label, "setting": setting, "way": way})


def by_concept(story: Story, z: dict[str, torch.Tensor], head: Row) -> list[Row]:
    """One row with all scores, and one with two on."""
    known, rows = story.known["test"], []
    for on in ("all",) if head["kind"] in FLOORS else ("all", "two"):
        validation, test, _ = rivals.resolved(story, z, None if on == "all" else SETTINGS["two_on"])
        named = {f"{f}: {n}": v for f, n, v in zip(known.families, known.names, test.tolist(), strict=True)}
        rows.append(head | {"on": on, "validation": validation.mean().item()} | named)
    return rows


def held_rows(story: Story, changes: torch.Tensor, key: Row, label: str, setting: str) -> list[Row]:
    """The share of every behaviour's gradient, on test stories, that some of these rows rebuild."""
    names = [f"says: {name}" for name in story.behaving["test"]]  # one of them is "size", as a column is
    found = clusters.rebuilt(story.gradients["test", key["weight"]], changes, COUNTS)
    return [key | {"label": label, "setting": setting, "rows": count} | dict(zip(names, share.tolist(), strict=True))
            for count, share in found.items()]  # fmt: skip


def fit(story: Story, files: dict[str, File], key: Row) -> None:
    """All rows of one kind, weight, size and seed."""
    plan, made, rows = chosen(files["tuning"], key["size"], key["kind"]), {}, []
    wanted = {setting for setting, _ in plan.values()}
    best = best_held(files["tuning"], key["size"], key["kind"]) if key["kind"] != "PCA" else None
    held = []
    for setting in wanted | ({best} if best else set()):
        made[setting] = KINDS[key["kind"]](story, key["weight"], key["size"], key["seed"], json.loads(setting))
    for label, (setting, way) in plan.items():
        rows += scored(story, made[setting], key, label, setting, way)
    if best:
        label = "single gradients" if key["kind"] == "training inputs" else key["kind"]
        held = held_rows(story, made[best].changes(), key, label, best)
    files["behaviours"].add(held)
    files["concepts"].add(rows)


def once(story: Story, files: dict[str, File], weight: str, size: int) -> None:
    """What depends on no seed: units of tokens, linear probes, and principal components of gradients."""
    key = {"weight": weight, "size": size, "kind": "once", "seed": 0}
    if files["concepts"].has(**key):
        return
    site = story.site(weight)
    some = torch.randperm(len(site.given), generator=torch.Generator().manual_seed(0))[:8192]
    g = torch.einsum("ni,no->nio", site.given[some], site.asked[some]).flatten(1)
    components = torch.linalg.eigh(g.T @ g).eigenvectors.flip(1).T[:size]
    files["behaviours"].add(held_rows(story, components, key, "PCA of gradients", "{}"))
    known = story.known["test"]
    probe = rivals.precision_of(rivals.of_probes(story, weight), known.truth)
    named = {f"{f}: {n}": v for f, n, v in zip(known.families, known.names, probe.tolist(), strict=True)}
    rows = [key | {"label": "ridge probe", "setting": "{}", "way": "supervised", "on": "all"} | named]
    rows += by_concept(story, rivals.of_tokens(story, size), key | {"label": "tokens", "setting": "{}", "way": "token"})
    files["concepts"].add(rows)


def jobs(sizes: tuple[int, ...]) -> Iterator[tuple[str, str, int, int]]:
    """(what, weight, size, seed), what the notebook needs most first."""
    for size in sizes:
        yield "tune", TUNED, size, 0
    for seed in SEEDS:
        for weight in reversed(SITES):
            for size in reversed(sizes):
                yield "once", weight, size, 0
                yield "fit", weight, size, seed


def check() -> None:
    """Write the settings, or refuse files made with others."""
    path, settings = RUNS / "stories.json", json.loads(json.dumps(SETTINGS))
    if path.exists() and json.loads(path.read_text())["settings"] != settings:
        sys.exit(f"{path} was made with other settings; move it and the CSV files beside it away to make them again")
    if not path.exists():
        content = {"command": "python notebooks/tools/long/stories.py", "settings": settings, "versions": versions()}
        path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description="Units of the story model by kind, weight, size and seed.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    check()
    files = {name: File(f"stories{end}") for name, end in
             {"tuning": "_tuning", "concepts": "", "behaviours": "_behaviours"}.items()}  # fmt: skip
    windows = {name: SETTINGS[name] for name in ("fit_windows", "held_windows", "behaving_windows", "length")}
    story = Story(**windows)
    jobs_of = [job for sizes in (SIZES[:2], SIZES[2:]) for job in jobs(tuple(n for n in sizes if n in arguments.sizes))]
    for what, weight, size, seed in jobs_of:
        if what == "tune":
            tune(story, files["tuning"], size)
        elif what == "once":
            once(story, files, weight, size)
        for kind in KINDS if what == "fit" else ():
            if time.monotonic() - started > 60 * arguments.minutes:
                return
            key = {"weight": weight, "size": size, "kind": kind, "seed": seed}
            if not files["concepts"].has(**key):
                fit(story, files, key)
                print(*key.values(), f"{(time.monotonic() - started) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
