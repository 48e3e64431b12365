"""Starts at samples: every kind of gradient gets a direction, however small or rare."""

from typing import Any

import pytest
import torch
from torch import Tensor

import eigendecomp as ed
from eigendecomp.batches import LiveBatches
from eigendecomp.directions import Directions
from eigendecomp.fit import State
from eigendecomp.gradients import Formed, Gradients
from eigendecomp.settings import Settings
from eigendecomp.start import at_samples
from eigendecomp.study.scores import max_cosine
from eigendecomp.support.axes import Factorization
from eigendecomp.support.random import generator
from eigendecomp.target import Target
from tests.method.test_decomposition import classifier, flat, normal
from tests.method.test_devices import CASES

SHAPES = {"layer.weight": (5, 7), "layer.bias": (5,)}
KINDS = 12


class Kinds(LiveBatches):
    """Gradients of rank one in every tensor, of kinds that grow smaller: the last is a thousandth of the first."""

    def __init__(self, seed: int = 0, zero: bool = False, bare: bool = False) -> None:
        atoms = Directions.random(SHAPES, KINDS, 1, generator=torch.Generator().manual_seed(seed))
        if bare:  # the bias has no gradient
            atoms.factors["layer.bias"][0].zero_()
        self.rows = atoms.flat() * (0.0 if zero else 1.0)

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        kind = torch.randint(KINDS, (size,), generator=generator)
        sizes = torch.rand(size, generator=generator) * torch.logspace(0, -3, KINDS)[kind]
        return Gradients(SHAPES, [Formed(SHAPES, sizes[:, None] * self.rows[kind])])


def settings(n: int, rank: int = 1, factorization: Factorization = "cp", seed: int = 0, size: int = 64) -> Settings:
    few, rules = ed.BatchTopK(0.5), (ed.SquaredError(), ed.Constant(0.0), ("*",))
    return Settings(*rules, n, rank, factorization, False, few, 1, size, 0.1, seed, start="samples")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def started(of: Settings, batches: LiveBatches) -> Directions:
    return at_samples(Target(Layer(), ["*"]), of, batches, generator(of.seed, "references"), "directions")


@pytest.mark.parametrize("seed", range(5))
def test_as_many_directions_as_kinds_are_the_kinds_however_small(seed: int) -> None:
    u, kinds = started(settings(KINDS, seed=seed, size=256), Kinds(seed)), Kinds(seed).rows
    assert max_cosine(u.flat(), kinds).min() > 0.999
    random = settings(KINDS, seed=seed).random(Target(Layer(), ["*"]))
    assert max_cosine(random.flat(), kinds).min() < 0.9


@pytest.mark.parametrize("factorization", ["cp", "tucker"])
def test_a_direction_of_higher_rank_is_mostly_its_first_term(factorization: Factorization) -> None:
    u = started(settings(3 * KINDS, 3, factorization), Kinds())
    assert max_cosine(Kinds().rows, u.flat()).min() > 0.9
    assert torch.allclose(u.norms(), torch.ones(u.n), atol=1e-5)
    # The others are there too: factors of zeros would never train.
    assert all((factor.norm(dim=-1) > 0).all() for factor in u.tensors())


@pytest.mark.parametrize("given", [{"zero": True}, {"bare": True}])
def test_where_there_is_no_gradient_directions_still_have_a_size(given: dict[str, bool]) -> None:
    u = started(settings(8), Kinds(**given))
    assert all(factor.isfinite().all() and (factor.norm(dim=-1) > 0).all() for factor in u.tensors())
    assert torch.allclose(u.norms(), torch.ones(u.n), atol=1e-5)


def test_more_directions_than_a_batch_has_samples() -> None:
    u = started(settings(50, size=4), Kinds())
    assert u.n == 50 and max_cosine(Kinds().rows, u.flat()).min() > 0.99


@pytest.mark.parametrize("make, inputs", CASES.values(), ids=CASES.keys())
def test_every_model_is_started_at_its_samples(make: Any, inputs: Any) -> None:
    """Of each start, a share of some sample's gradient that no random direction has."""
    options: dict[str, Any] = {"n_directions": 3, "steps": 1, "batch_size": 8, "learning_rate": 1e-9, "progress": False}
    model, x = make().eval(), inputs()
    d, random = (ed.decompose(model, x, start=start, **options) for start in ("samples", "random"))
    g = torch.cat([part.flat() for part in d.gradients(x, 4, 0)])
    unit = torch.nn.functional.normalize(g[g.norm(dim=1) > 0], dim=1)
    own, others = ((unit @ flat(one).to(unit).T).abs().amax(0).min().item() for one in (d, random))
    assert own > min(0.3, 2 * others)


def test_the_same_seed_starts_the_same_and_restarts_start_apart() -> None:
    x = normal(300, 3, seed=1)
    options: dict[str, Any] = {"steps": 30, "n_directions": 6, "progress": False, "start": "samples", "restarts": 2}
    one, same, another = (ed.decompose(classifier(), x, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(flat(one), flat(same)) and one.history == same.history
    assert not torch.equal(flat(one), flat(another))
    assert len(set(one.history.restarts)) == 2


def test_a_fit_at_samples_goes_on_where_it_was_interrupted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, end = normal(300, 3, seed=1), State.update
    options: dict[str, Any] = {"steps": 30, "n_directions": 6, "progress": False, "start": "samples"}
    whole = ed.decompose(classifier(), x, **options)
    options |= {"checkpoint": tmp_path / "fit", "checkpoint_seconds": 0}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(State, "update", lambda self, *given: end(self, *given) if self.step < 17 else 1 / 0)
        ed.decompose(classifier(), x, **options)
    assert torch.equal(flat(ed.decompose(classifier(), x, **options)), flat(whole))


def test_a_start_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start='data'.*random"):
        ed.decompose(classifier(), normal(30, 3), start="data", progress=False)  # type: ignore[arg-type]
