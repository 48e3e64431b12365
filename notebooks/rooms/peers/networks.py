"""The toys that the peers are compared on, trained once and kept, so that every method takes apart the same weights.

Weights and long runs lie in data/runs/peers, written by notebooks/tools/long/peers.py.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.decomposition import Decomposition, decompose
from eigendecomp.reference import Constant, Mean
from eigendecomp.sparsity import BatchTopK
from eigendecomp.support import files
from eigendecomp.targets.toys import circuits, groups, resid_mlp, squares, tms
from rooms import fitting
from rooms.peers import residual, scores

FOLDER = Path(__file__).resolve().parents[3] / "data" / "runs" / "peers"
LARGE: dict[str, Any] = {"steps": 2000, "learning_rate": 0.01, "instances": 4}  # trains the 40 features faster


@dataclass(frozen=True)
class Network:
    """A target, the samples that every method gets, and its features one at a time."""

    features: int
    make: Callable[[], nn.Module]  # untrained, to load weights into
    train: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], Float[Tensor, "n inputs"]]
    alone: Callable[[], Float[Tensor, "features m inputs"]]
    samples: int = 6000  # that ours are fitted to


def superposed(features: int, hidden: int, **training: Any) -> Network:
    """Features in superposition: the trained pentagon (or its like), with W_out as a matrix of its own."""
    return Network(
        features,
        lambda: tms.TMS(features, hidden, tied=False),
        lambda: tms.untie(tms.train(features, hidden, tied=True, seed=0, **training)[0]),
        lambda n, draw: tms.data(n, features, draw, none_empty=True),
        lambda: tms.one_hot(features).unsqueeze(1),
    )


def spread(layers: int) -> Network:
    """A residual network whose features are computed by all layers together (notebook layers)."""
    features = fitting.SIZES[layers]["features"]
    return Network(
        features,
        lambda: residual.untrained(layers),
        lambda: residual.train(layers),
        lambda n, draw: resid_mlp.data(n, features, draw),
        lambda: tms.one_hot(features).unsqueeze(1),
        fitting.SAMPLES,
    )


SMALL = superposed(5, 2)
NETWORKS = {
    "tms": SMALL,
    "identity": replace(
        SMALL, make=lambda: tms.TMS(5, 2, tied=False, identity=True), train=lambda: tms.with_identity(small())
    ),
    "large": superposed(40, 10, **LARGE),
    "circuits": Network(
        10,
        lambda: tms.TMS(10, 5, tied=False),
        lambda: circuits.train(10, 5, seed=0)[0],
        lambda n, draw: circuits.data(n, 10, draw),
        lambda: tms.one_hot(10).unsqueeze(1),
    ),
    "groups": Network(
        5,
        lambda: tms.TMS(25, 10, tied=False),
        lambda: groups.train(5, 5, 10, seed=0)[0],
        lambda n, draw: groups.data(n, 5, 5, draw),
        lambda: groups.alone(5, 5, 8, torch.Generator().manual_seed(0)),
    ),
    "squares": Network(
        5,
        lambda: squares.Squares(5, 10, 4),
        lambda: squares.train(5, 10, 4, seed=0)[0],
        lambda n, draw: squares.data(n, 5, draw),
        lambda: squares.alone(5),
    ),
    "resid1": spread(1),
    "resid2": spread(2),
}


def path(name: str) -> Path:
    """Where a run is kept."""
    return FOLDER / f"{name}.safetensors"


def load(target: str) -> nn.Module:
    """A trained target from its file.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    model = NETWORKS[target].make()
    model.load_state_dict(files.read(path(f"{target}-network"))[0])
    return model.eval()


def small() -> tms.TMS:
    """The five features in two dimensions."""
    model = load("tms")
    assert isinstance(model, tms.TMS)
    return model


def weights(model: nn.Module) -> list[str]:
    """The names of the weights, without biases, which not every method takes apart."""
    return [stage.name for stage in model.stages()]  # type: ignore[operator]


# Ours, chosen on seeds 0 and 100. Circuits and groups are compared with zero, as L3D's code has it. Of squares x and
# −x pass through different units, so that there are two directions each. Residual networks as in `layers`.
SPREAD: dict[str, Any] = {
    "reference": Mean(), "sparsity": BatchTopK(fitting.KEPT / 150), "n_directions": 150,
    "batch_size": fitting.BATCH_SIZE, "learning_rate": fitting.LEARNING_RATE,
}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "resid1": {**SPREAD, "steps": fitting.SINGLE[1]}, "resid2": {**SPREAD, "steps": fitting.SINGLE[2]},
    "tms": {"reference": Mean(), "sparsity": BatchTopK(0.2), "steps": 1500},
    "identity": {"reference": Mean(), "sparsity": BatchTopK(0.25), "steps": 400},
    "large": {"reference": Mean(), "sparsity": BatchTopK(0.05), "steps": 2000, "batch_size": 256},
    "circuits": {"reference": Constant(0.0), "sparsity": BatchTopK(0.1), "steps": 1200, "batch_size": 256},
    "groups": {"reference": Constant(0.0), "sparsity": BatchTopK(0.1), "steps": 600, "n_directions": 10},
    "squares": {
        "reference": Mean(), "sparsity": BatchTopK(0.125), "steps": 800, "batch_size": 256, "n_directions": 10,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Directions:
    """Directions of a toy, their rows fitted again to the samples that keep one alone, and the processor's seconds."""

    decomposition: Decomposition
    refitted: Float[Tensor, "v w"]
    seconds: float

    def own_cosine(self, weight: Float[Tensor, "features hidden"]) -> float:
        """The mean cosine of features' vectors with the refitted rows in which they are longest."""
        components = scores.parts_of(self.refitted, self.decomposition.target.shapes)["W_in"]
        return scores.own_cosines(scores.signed(components, weight), weight).mean().item()


def directions(name: str, x: Float[Tensor, "n inputs"], seed: int, **setting: Any) -> Directions:
    """A fit of a toy on samples, with its own settings but for those given."""
    clock, model = time.process_time(), load(name)
    options = {"n_directions": NETWORKS[name].features, "batch_size": 128, **OURS[name], **setting}
    d = decompose(model, x, parameters=weights(model), seed=seed, progress=False, **options)
    return Directions(d, scores.refitted(d, x), time.process_time() - clock)
