"""How often fits find what is known to be there, on three processors' kernels: data/runs/machines.csv.

    python notebooks/tools/long/machines.py [--seeds 20] [--kernels own AVX2 SSE4.1] [--targets circles "five in two"]

A processor's kernels are those that the libraries choose on it. Environment variables, set before torch is imported,
make them choose as on another processor: the last bits of every product change, and with them what the networks that
are decomposed are trained to. A row of the table is one fit: its settings, what it found and the seconds of the
processor it took. Rows that are there already are not computed again, so that a run that was stopped goes on.

The settings were chosen on fitting seeds 100 to 104 and 200 to 203; the rates are those of seeds 0 and up. *Best of
six* was added after seed 4 of the free network had failed three times over; seeds 20 and up were run after that.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "data" / "runs" / "machines.csv"
KERNELS = {
    "own": {},
    "AVX2": {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "SSE4.1": {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
COLUMNS = (
    "target", "setting", "kernels", "seed", "found", "rows", "rank", "kept", "steps", "restarts", "prune", "left",
    "share", "fewest", "most", "error", "seconds", "processor", "capability", "torch", "eigendecomp",
)  # fmt: skip
# One fit as long as before, and the best of some shorter ones without the rows that do not earn their place.
ONE = {"restarts": 1, "prune": None}
CIRCLES = {"pruned, best of four": {"rows": 24, "steps": 400, "restarts": 4, "prune": 0.004},
           "one fit": {"rows": 24, "steps": 1200, **ONE}}  # fmt: skip
FIVE = {"best of three": {"rows": 5, "steps": 1000, "restarts": 3, "prune": None},
        "best of six": {"rows": 5, "steps": 1000, "restarts": 6, "prune": None},
        "one fit": {"rows": 5, "steps": 1000, **ONE}}  # fmt: skip
TARGETS = {"circles": CIRCLES, "five in two": FIVE, "five in two, free": FIVE}
Fit = Callable[[int, dict[str, Any]], dict[str, Any]]  # from a seed and a setting to what was found


def circles() -> Fit:
    """Six circles whose angles are doubled: found if each has three directions and each direction one circle."""
    import eigendecomp as ed
    from eigendecomp import study
    from eigendecomp.targets.toys import manifold

    planes = manifold.planes(6, 72, 0)
    model, _, _ = manifold.train(planes, 10, 64, seed=0)
    train_x, test_x = (manifold.alone(n, planes, seed) for n, seed in ((4096, 1), (2048, 2)))
    probe = manifold.around(planes, 64)[1]

    def fit(seed: int, options: dict[str, Any]) -> dict[str, Any]:
        rows, kept = options["rows"], 1.6
        d = ed.decompose(
            model, train_x, reference=ed.Constant(0.0), parameters=["embed.weight"], n_directions=rows, rank=3,
            factorization="tucker", tied=True, sparsity=ed.BatchTopK(kept / rows, warmup=0.1, auxiliary=0.02),
            steps=options["steps"], batch_size=128, learning_rate=3e-2, seed=seed, prune=options["prune"],
            restarts=options["restarts"], progress=False,
        )  # fmt: skip
        score = study.rates.by_group(d.encode(test_x, sparse=True), d.impact(probe.flatten(0, 1)).unflatten(0, (6, -1)))
        found = score["fewest units"] == score["most units"] == 3 and score["share"] >= 0.9
        return {
            "found": int(found), "rank": 3, "kept": kept, "left": d.decoder.n, "share": score["share"],
            "fewest": score["fewest units"], "most": score["most units"], "error": d.reconstruction_error(test_x),
        }  # fmt: skip

    return fit


def five(free: bool) -> Fit:
    """Five features in two dimensions: found if each owns a direction by impact. ``share``: the least selectivity."""
    import eigendecomp as ed
    from eigendecomp import study
    from eigendecomp.targets.toys import tms

    if free:
        model, _ = tms.train(5, 2, tied=False, seed=0, weight_decay=0.0, instances=8)
    else:
        model = tms.untie(tms.train(5, 2, tied=True, seed=0)[0])
    import torch

    draw = torch.Generator().manual_seed(1)
    train_x, test_x = (tms.data(n, 5, draw, none_empty=True) for n in (10_000, 5000))

    def fit(seed: int, options: dict[str, Any]) -> dict[str, Any]:
        rows, kept = options["rows"], 0.5
        d = ed.decompose(
            model, train_x, reference=ed.OtherSample(pool=8192), n_directions=rows, sparsity=ed.BatchTopK(kept / rows),
            steps=options["steps"], seed=seed, prune=options["prune"], restarts=options["restarts"], progress=False,
        )  # fmt: skip
        owners = study.scores.ownership(d.impact(tms.one_hot(5), 64))
        return {
            "found": int(owners.owned == 5), "rank": 1, "kept": kept, "left": d.decoder.n,
            "share": owners.by_feature(5).min().item(), "fewest": owners.owned, "most": d.decoder.n,
            "error": d.reconstruction_error(test_x),
        }  # fmt: skip

    return fit


def done() -> set[tuple[str, ...]]:
    """Target, setting, kernels and seed of the rows that are there; those of other settings are refused."""
    if not TABLE.exists():
        return set()
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        options = TARGETS.get(row["target"], {}).get(row["setting"], {})
        there = {key: row[key] for key in ("rows", "steps", "restarts", "prune")}
        if {key: "" if value is None else str(value) for key, value in options.items()} != there:
            sys.exit(f"{TABLE.name}: {row['target']}, {row['setting']} was fitted with {there}; move the file away")
    return {tuple(row[key] for key in COLUMNS[:4]) for row in rows}


def asked(kernels: str, targets: list[str], settings: str, seeds: int) -> Iterator[tuple[str, str, int]]:
    """What is still to do: target, setting and seed."""
    there = done()
    for target in targets:
        for setting in (name for name in TARGETS[target] if settings in name):
            for seed in range(seeds):
                if (target, setting, kernels, str(seed)) not in there:
                    yield target, setting, seed


def work(kernels: str, targets: list[str], settings: str, seeds: int) -> None:
    """Fit and add a row at a time, in a process with these kernels."""
    import torch

    from eigendecomp.report.results import versions

    torch.set_num_threads(1)
    made, about = {}, versions()
    makers: dict[str, Callable[[], Fit]] = {
        "circles": circles, "five in two": lambda: five(False), "five in two, free": lambda: five(True),
    }  # fmt: skip
    for target, setting, seed in asked(kernels, targets, settings, seeds):
        if target not in made:
            made[target] = makers[target]()
        options, started = TARGETS[target][setting], time.process_time()
        row = made[target](seed, options)
        row |= {"seconds": time.process_time() - started, **options, "target": target, "setting": setting}
        row |= {"kernels": kernels, "seed": seed, "capability": about["kernels"]["torch"]}
        add(row | {key: about[key] for key in ("processor", "torch", "eigendecomp")})


def add(row: dict[str, Any]) -> None:
    """One more row of the table."""
    new = not TABLE.exists()
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({key: f"{x:.5g}" if isinstance(x := row[key], float) else x for key in COLUMNS})


def main() -> None:
    """Start a process for each processor's kernels, one after the other."""
    parser = argparse.ArgumentParser(description="How often fits find what is known, on three processors' kernels.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--settings", default="", help="only settings whose name holds this")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.kernels[0], options.targets, options.settings, options.seeds)
        return
    for name in options.kernels:
        if not list(asked(name, options.targets, options.settings, options.seeds)):
            continue
        command = [sys.executable, __file__, "--worker", "--kernels", name, "--targets", *options.targets]
        command += ["--settings", options.settings, "--seeds", str(options.seeds)]
        subprocess.run(command, env={**os.environ, **KERNELS[name], "PYTHONPATH": str(ROOT)}, check=True)


if __name__ == "__main__":
    main()
