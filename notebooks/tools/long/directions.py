"""A tenth of a large run: 10,000 directions on 100,000 samples of one 256 × 256 weight, from a store of gradients.

    python notebooks/tools/long/directions.py [--out data/runs/directions.json]

A file that is there already is left as it is; one made with other settings is refused. ``make long`` runs it. What it
takes is compared with an estimate from five steps that is made in the same process, just before.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).resolve().parents[2]))  # notebooks/, where the rooms are

import torch

import eigendecomp as ed
from eigendecomp.factored.kept import coefficients
from rooms import kept_rows
from rooms.cost import benchmark, sizes

ROOT = Path(__file__).resolve().parents[3]
T = TypeVar("T")
SETTINGS: dict[str, Any] = {
    "width": 256, "positions": 16, "samples": 100_000, "directions": 10_000, "kept": 10, "batch_size": 128,
    "warmup": 0.0, "auxiliary": 0.0, "parameter": "attn.v.weight", "seed": 0,
}  # fmt: skip


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What the work returns, and its CPU seconds."""
    start = time.process_time()
    made = work()
    return made, time.process_time() - start


def run(s: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Capture the gradients, fit once through all of them, and read the result on samples that the fit has not seen."""
    width, t, batch = s["width"], s["positions"], s["batch_size"]
    step = benchmark.objective_step(benchmark.uses(1, batch, t, width, width), s["directions"], s["kept"], coefficients)
    estimate = benchmark.seconds({"step": step}, 5, 60.0)["step"]
    torch.manual_seed(s["seed"])
    model = sizes.AttentionModel(width).eval()
    x, unseen = torch.randn(s["samples"] // t, t, width), torch.randn(16, t, width)
    steps = s["samples"] // batch
    store, capture = timed(
        lambda: ed.GradientStore.collect(
            model, x, path=folder, divergence=ed.KLDivergence(), parameters=[s["parameter"]], seed=s["seed"]
        )
    )
    rule = ed.BatchTopK(s["kept"] / s["directions"], s["warmup"], s["auxiliary"])
    d, fit = timed(
        lambda: store.decompose(
            n_directions=s["directions"], steps=steps, batch_size=batch, sparsity=rule, seed=s["seed"]
        )
    )
    error, history = d.history.error, d.history
    return {
        "estimated_step_seconds": estimate, "estimated_seconds": estimate * steps, "steps": steps,
        "capture_seconds": capture, "fit_seconds": fit, "store_bytes": store.shards.bytes,
        "peak_bytes": benchmark.process_peak(), "first_error": error[0], "last_error": error[-1],
        "unseen_error": d.reconstruction_error(unseen), "kept_a_sample": history.kept[-1], "dead": history.dead[-1],
    }  # fmt: skip


def main() -> None:
    """Make the file if it is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "runs" / "directions.json")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        kept_rows.once(out, SETTINGS, "notebooks/tools/long/directions.py", lambda: run(SETTINGS, store))


if __name__ == "__main__":
    main()
