"""The fits behind the notebook `tinystories`: units of many kinds at two sites, by size and seed.

    python notebooks/tools/long/stories.py [--minutes M] [--sizes 100 300]

For each size settings are chosen first, on one weight, seed 100 and validation stories (stories_tuning.csv).
Then every kind is fitted from three seeds, its units chosen on validation stories, and scored once on test stories,
those of W_V besides on fresh ones, other stories of the same split that nothing was scored on before: concepts go to
stories.csv and stories_fresh.csv, behaviours' gradients to stories_behaviours.csv and stories_fresh_behaviours.csv.
Rows are written as they come and those that are there are not made again, so that the command may be stopped and given
again. Files made with other settings than those in stories.json are refused. It takes about two hours of one core.
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
sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

import pandas as pd
import torch

from eigendecomp.report.results import versions
from eigendecomp.study import clusters
from rooms.stories import rivals
from rooms.stories.rivals import COUNTS, KINDS, SITES, Story, Units

RUNS = Path(__file__).resolve().parents[3] / "data" / "runs"
TUNING_SEED, SEEDS, SIZES = 100, (0, 1, 2), (100, 300, 1000)
KEPT = {  # the grid of autoencoders goes on until its best is no edge
    "directions": dict.fromkeys(SIZES, (1, 2, 8)),
    "SAE": {100: (1, 2, 4, 8), 300: (1, 2, 4, 8, 16, 32), 1000: (2, 4, 8, 16, 32, 64)},
}
STEPS = {"directions": (700, 2000), "SAE": (1200, 3000)}  # the second is tried with the best kept, at some sizes
LONGER = (100, 1000)
SIZES_OF = {"W_K": (100, 300), "W_V": SIZES}
PARTS_OF = {"W_K": ("test",), "W_V": ("test", "fresh")}  # fresh: other stories, which nothing was scored on before
TUNED = "W_V"  # the weight on which settings are chosen, for both
OTHER: dict[str, list[dict[str, Any]]] = {
    "k-means of inputs": [{"restarts": 3}],
    "k-means of gradients": [{"signed": s, "by_input": b} for s in (True, False) for b in (True, False)],
    "training inputs": [{}], "random rows": [{}], "PCA": [{}],
}  # fmt: skip
SHARES = (1, 2, 5, 10, 20, 50, 100, 200)  # rows that rebuild a behaviour on fresh stories
SETTINGS = {
    "fit_windows": 1000, "held_windows": 256, "behaving_windows": 256, "fresh_windows": 512, "length": 32,
    "seed_of_windows": 7, "kept": KEPT, "steps": STEPS, "longer": LONGER, "other": OTHER, "counts": COUNTS,
    "shares": SHARES, "two_on": 2, "tuning_seed": TUNING_SEED, "tuned_on": TUNED,
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
ENDS = {  # of the files' names, by what they hold and of which split
    ("tuning", ""): "_tuning", ("concepts", "test"): "", ("behaviours", "test"): "_behaviours",
    ("concepts", "fresh"): "_fresh", ("behaviours", "fresh"): "_fresh_behaviours",
}  # fmt: skip
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
        self.write()

    def put(self, rows: list[Row]) -> None:
        """Write a fit's rows of one label, in the place of those that it had by another setting."""
        same = ("weight", "size", "kind", "seed", "label")
        new = {tuple(row[k] for k in same) for row in rows}
        self.rows = [row for row in self.rows if tuple(row[k] for k in same) not in new] + rows
        self.write()

    def write(self) -> None:
        """Write all rows, or nothing."""
        part = self.path.with_suffix(".partial")
        pd.DataFrame(self.rows).to_csv(part, index=False, float_format="%.4g")
        part.replace(self.path)


Files = dict[tuple[str, str], File]


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
        shares = clusters.rebuilt(story.gradients("choose", key["weight"]), units.changes(), COUNTS)
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
        for kept in counts[size]:
            run(kind, {"kept": kept, "steps": STEPS[kind][0]})
        label = "directions" if kind == "directions" else "SAE, before its threshold"
        if size in LONGER and not any(json.loads(row["setting"]).get("steps") == STEPS[kind][1] for row in file.rows
                                      if (row["size"], row["kind"]) == (size, kind)):  # fmt: skip
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


def lacking(files: Files, what: str, key: Row, label: str, setting: str) -> list[str]:
    """The splits in which a label of a fit has no row of this setting yet."""
    return [part for part in PARTS_OF[key["weight"]] if not files[what, part].has(**key, label=label, setting=setting)]


def by_concept(story: Story, z: dict[str, torch.Tensor], part: str, head: Row) -> list[Row]:
    """Every concept in a split, in a row by all scores, and in one by the two largest of a token alone."""
    rows = []
    for on in ("all",) if head["kind"] in FLOORS else ("all", "two"):
        validation, held, _ = rivals.resolved(story, z, None if on == "all" else SETTINGS["two_on"], part)
        rows.append(head | {"on": on, "validation": validation.mean().item()} | named(story, held))
    return rows


def named(story: Story, precision: torch.Tensor) -> Row:
    """{concept: precision}."""
    known = story.known["test"]
    return {f"{f}: {n}": v for f, n, v in zip(known.families, known.names, precision.tolist(), strict=True)}


def held_rows(story: Story, changes: torch.Tensor, part: str, head: Row) -> list[Row]:
    """The share of every behaviour's gradient in a split that some of these rows rebuild, and that all of them do."""
    names = [f"says: {name}" for name in story.behaving["test"]]  # one of them is "size", as a column is
    g = story.gradients(part, head["weight"])
    found = clusters.rebuilt(g, changes, COUNTS if part == "test" else SHARES)
    if part == "fresh":
        rows, wanted = changes.double(), g.double()
        along = wanted @ rows.T
        inverse = torch.linalg.pinv(rows @ rows.T, rtol=1e-9, hermitian=True)
        found[len(changes)] = ((along @ inverse) * along).sum(1) / wanted.square().sum(1)
    return [head | {"rows": count} | dict(zip(names, share.tolist(), strict=True))
            for count, share in found.items()]  # fmt: skip


def fit(story: Story, files: Files, key: Row) -> None:
    """All rows of one kind, weight, size and seed that are not there."""
    site, made, kind = story.site(key["weight"]), {}, KINDS[key["kind"]]

    def units(setting: str) -> Units:
        if setting not in made:
            made[setting] = kind(story, key["weight"], key["size"], key["seed"], json.loads(setting))
        return made[setting]

    for label, (setting, way) in chosen(files["tuning", ""], key["size"], key["kind"]).items():
        for part in lacking(files, "concepts", key, label, setting):
            z = units(setting).scores(way, {name: site.x[name] for name in ("choose", part)})
            head = key | {"label": label, "setting": setting, "way": way}
            files["concepts", part].put(by_concept(story, z, part, head))
    if key["kind"] != "PCA":
        best = best_held(files["tuning", ""], key["size"], key["kind"])
        label = "single gradients" if key["kind"] == "training inputs" else key["kind"]
        for part in lacking(files, "behaviours", key, label, best):
            head = key | {"label": label, "setting": best}
            files["behaviours", part].put(held_rows(story, units(best).changes(), part, head))


def once(story: Story, files: Files, weight: str, size: int) -> None:
    """What depends on no seed: units of tokens, linear probes, and principal components of gradients."""
    key = {"weight": weight, "size": size, "kind": "once", "seed": 0}
    if wanted := lacking(files, "behaviours", key, "PCA of gradients", "{}"):
        site = story.site(weight)
        some = torch.randperm(len(site.given), generator=torch.Generator().manual_seed(0))[:8192]
        g = torch.einsum("ni,no->nio", site.given[some], site.asked[some]).flatten(1)
        components = torch.linalg.eigh(g.T @ g).eigenvectors.flip(1).T[:size]
        for part in wanted:
            head = key | {"label": "PCA of gradients", "setting": "{}"}
            files["behaviours", part].put(held_rows(story, components, part, head))
    for part in lacking(files, "concepts", key, "tokens", "{}"):
        probe = rivals.precision_of(rivals.of_probes(story, weight, part=part), story.known[part].truth)
        head = key | {"label": "ridge probe", "setting": "{}", "way": "supervised", "on": "all"}
        rows = [head | named(story, probe)]
        head = key | {"label": "tokens", "setting": "{}", "way": "token"}
        files["concepts", part].put(rows + by_concept(story, rivals.of_tokens(story, size), part, head))


def jobs(sizes: tuple[int, ...]) -> Iterator[tuple[str, int, int]]:
    """(weight, size, seed), what the notebook needs most first."""
    for weight in reversed(SITES):
        for seed in SEEDS:
            for size in reversed([size for size in sizes if size in SIZES_OF[weight]]):
                yield weight, size, seed


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
    files = {key: File(f"stories{end}") for key, end in ENDS.items()}
    windows = ("fit_windows", "held_windows", "behaving_windows", "fresh_windows", "length")
    story = Story(**{name: SETTINGS[name] for name in windows})
    for weight, size, seed in jobs(tuple(n for n in SIZES if n in arguments.sizes)):
        tune(story, files["tuning", ""], size)
        once(story, files, weight, size)
        for kind in KINDS:
            if time.monotonic() - started > 60 * arguments.minutes:
                return
            fit(story, files, {"weight": weight, "size": size, "kind": kind, "seed": seed})
            print(weight, size, kind, seed, f"{(time.monotonic() - started) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
