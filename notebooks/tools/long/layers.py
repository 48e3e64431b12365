"""The fits behind the notebook `layers`, one after another: recovery by layers, embedding, directions and seed.

    python notebooks/tools/long/layers.py [--out data/runs/layers.json] [--minutes M]

Rows are written as they come and those that are there already are not fitted again, so that the command may be stopped
and given again. A file made with other settings is refused. ``make long`` runs it to the end.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

import torch

import eigendecomp as ed
from eigendecomp.report.results import plain
from eigendecomp.study import floors, recovery
from eigendecomp.targets.toys import resid_mlp
from eigendecomp.targets.toys.resid_mlp import ResidMLP
from rooms import fitting, kept_rows, strengths

ROOT = Path(__file__).resolve().parents[3]
SETTINGS: dict[str, Any] = {
    "samples": fitting.SAMPLES, "kept": fitting.KEPT, "steps": {str(k): n for k, n in fitting.STEPS.items()},
    "single": {str(k): n for k, n in fitting.SINGLE.items()}, "restarts": 2, "start": "samples",
    "batch_size": fitting.BATCH_SIZE, "learning_rate": fitting.LEARNING_RATE, "rank": 1, "reference": "Mean",
    "training_steps": fitting.TRAINING_STEPS, "training_batch": 256, "networks": 4, "width": 200,
}  # fmt: skip
SWEEP = (0.5, 1.0, 2.0, 4.0)
Run = dict[str, Any]


def run(
    layers: int, seed: int, embedding: str = "identity", multiple: float = 1.5, width: int = 0, only: int = -1,
    single: bool = False,
) -> Run:  # fmt: skip
    """What a row is known by; ``only`` is the layer whose parameters are decomposed alone, −1 for all.

    A ``single`` fit starts at random directions.
    """
    width = (fitting.SIZES[layers]["features"] if embedding == "identity" else 200) if width == 0 else width
    return {"layers": layers, "embedding": embedding, "width": width, "multiple": multiple, "only": only, "seed": seed,
            "single": single}  # fmt: skip


def runs() -> Iterator[Run]:
    """All of them, what the notebook needs most first."""
    depths = tuple(fitting.SIZES)
    yield from (run(layers, 0) for layers in depths)
    yield from (run(3, 0, only=layer) for layer in range(3))
    yield run(3, 0, "random")
    yield from (run(layers, seed) for seed in (1, 2) for layers in depths)
    yield from (run(layers, 0, "random") for layers in depths[:2])
    yield from (run(layers, seed) for seed in range(3, 20) for layers in depths)
    yield from (run(layers, 0, multiple=multiple) for multiple in SWEEP for layers in depths)
    yield from (run(layers, seed, "random") for seed in (1, 2) for layers in depths)
    yield from (run(layers, 0, "random", width=1000) for layers in depths)
    yield from (run(layers, s, multiple=multiple) for s in (1, 2) for multiple in SWEEP for layers in depths)
    yield from (run(layers, seed, single=True) for seed in range(20) for layers in depths)
    yield from (run(layers, seed, "random", width=1000) for seed in (1, 2) for layers in depths)
    yield from (run(layers, seed, "random") for seed in range(3, 20) for layers in depths)


@cache
def network(layers: int, embedding: str, width: int, seed: int) -> tuple[ResidMLP, float]:
    """A trained network and what it misses."""
    size = {**fitting.SIZES[layers], "width": width}
    trained = {"steps": SETTINGS["training_steps"][embedding], "batch_size": SETTINGS["training_batch"]}
    return resid_mlp.train(layers, embedding, seed=seed, **size, **trained)  # type: ignore[arg-type]


def floor_rows(d: ed.Decomposition, model: ResidMLP, seed: int) -> dict[str, Any]:
    """The same scores of random rank-one rows, and of principal components of 1,000 gradients."""
    truth, shapes = model.truth(), d.target.shapes
    random = floors.random_directions(shapes, d.decoder.n, 1, seed=seed)
    x = resid_mlp.data(1000, len(model.W_E), torch.Generator().manual_seed(2000 + seed))
    g = torch.cat([part.flat() for part in d.gradients(x, 1, seed)])
    components = strengths.principal_parts(g, d.decoder.n, shapes)
    found = {
        "random": (strengths.random_strength(d, random, truth), {name: random.dense(name) for name in shapes}),
        "principal": (strengths.dense_strength(d, components, truth), components),
    }
    return {
        f"{name} {key}": value
        for name, (strength, rows) in found.items()
        for key, value in recovery.recovered(strength, rows, truth).row().items()
    }


def lost(d: ed.Decomposition, model: ResidMLP) -> list[float]:
    """For every feature that owns no direction, what the layers add to its own output where it is on alone, at 1.

    ReLU would add 1. A feature that the network itself hardly computes has small gradients and is lost first.
    """
    alone = model.truth().inputs
    owner, _ = recovery.owners(d.impact(alone))
    with torch.no_grad():
        return model.computed(alone).diagonal()[owner < 0].tolist()


def result(one: Run) -> Run:
    """The row of a run."""
    model, missed = network(one["layers"], one["embedding"], one["width"], one["seed"] % SETTINGS["networks"])
    n = round(one["multiple"] * len(model.W_E))
    started = time.process_time()
    d = fitting.fit(model, n, seed=one["seed"], only=one["only"], single=one["single"])
    row = {**one, "directions": n, "missed": missed, "fit_cpu_seconds": time.process_time() - started}
    row |= recovery.recovery(d, model).row()
    if one["multiple"] >= 1:
        row["lost_computed"] = lost(d, model)
    if one["multiple"] == 1.5 and one["only"] < 0 and not one["single"] and one["seed"] < 3 and one["width"] < 1000:
        row |= floor_rows(d, model, one["seed"])
    return plain(row)


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "runs" / "layers.json")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fit after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content, started = kept_rows.read(options.out, SETTINGS, "notebooks/tools/long/layers.py"), time.monotonic()
    done = [{key: row[key] for key in run(1, 0)} for row in content["rows"]]
    for one in runs():
        if one in done:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            break
        content["rows"].append(result(one))
        kept_rows.write(options.out, content)
        row = content["rows"][-1]
        print(f"{one}: {row['owned']} of {row['features']} owned, {row['fit_cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
