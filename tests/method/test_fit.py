"""Fits that find the same solution: directions that earn their place, and the best of several restarts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eigendecomp as ed
from eigendecomp import fit
from eigendecomp.fit import State, earning
from eigendecomp.settings import Settings
from eigendecomp.sparsity import Sparsity
from eigendecomp.study.scores import max_cosine
from tests.method.test_decomposition import Planted, classifier, flat, incoherent, normal

X = normal(300, 3, seed=1)


def quick(**options: Any) -> ed.Decomposition:
    return ed.decompose(classifier(), X, **{"steps": 40, "n_directions": 6, "progress": False, **options})


def settings(sparsity: Sparsity, prune: float | None) -> Settings:
    return Settings(ed.SquaredError(), ed.Constant(0.0), ("*",), 6, 1, "cp", True, sparsity, 1, 1, 0.1, 0, prune=prune)


def rebuilt(g: Tensor, rows: Tensor, z: Tensor) -> float:
    """Σ‖g − ĝ‖² / Σ‖g‖², with every gradient and direction formed."""
    return ((g - z @ rows).square().sum() / g.square().sum()).item()


@pytest.mark.parametrize("seed", range(3))
def test_what_was_planted_is_found_with_rows_to_spare_which_are_pruned(seed: int) -> None:
    planted, g = incoherent(seed), torch.Generator().manual_seed(seed)
    x = torch.rand(1000, 6, generator=g) * (torch.rand(1000, 6, generator=g) < 0.1)
    d = ed.decompose(
        Planted(planted), x[x.any(1)], reference=ed.ModelSample(), n_directions=10, sparsity=ed.BatchTopK(0.06),
        steps=400, batch_size=128, learning_rate=2e-2, seed=seed, progress=False, prune=0.01, restarts=3,
    )  # fmt: skip
    assert d.decoder.n == 6 and len(d.history.pruned) == 4
    assert max_cosine(flat(d), planted.flat()).min() > 0.99
    assert sorted(d.impact(torch.eye(6)).argmax(1).tolist()) == list(range(6))


def test_the_rows_without_which_as_much_is_rebuilt_are_left_out() -> None:
    """Four orthonormal rows hold everything; a blend of two of them takes some coefficients, and one is never used."""
    axes = torch.eye(5, dtype=torch.float64)
    blend = (axes[0] + 0.05 * axes[1]) / (1 + 0.05**2) ** 0.5
    rows = torch.cat([axes[:4], blend[None], axes[4:]])
    g = torch.zeros(400, 5, dtype=torch.float64)
    g[torch.arange(400), torch.arange(400) % 4] = 1.0
    g[::8] += 0.1 * axes[1]  # nearer to the blend than to the first
    z, gram = g @ rows.T, rows @ rows.T
    sparsity = ed.BatchTopK(1 / 6)
    live, error = earning(z, z, gram, g.square().sum(), settings(sparsity, 0.004))
    assert live.tolist() == [1, 1, 1, 1, 0, 0]
    assert error == pytest.approx(rebuilt(g, rows, sparsity.keep_batch(z * live, 1.0)))
    everything, before = earning(z, z, gram, g.square().sum(), settings(sparsity, None))
    assert everything.tolist() == [1] * 6 and error < before + 2 * 0.004
    # A fourth of all that there is earns its place under any smaller share, and not under a larger one.
    for share, count in ((0.2, 4), (0.4, 1)):
        live, _ = earning(z, z, gram, g.square().sum(), settings(sparsity, share))
        assert live.sum() == count


def test_every_row_that_is_left_earns_its_place() -> None:
    """Whichever of them is taken away: on random data, by the formula with everything formed."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator, dtype=torch.float64), dim=1)
    s = torch.randn(500, 6, generator=generator, dtype=torch.float64) * (torch.rand(500, 6, generator=generator) < 0.2)
    g = s * torch.tensor([1, 1, 1, 1, 0.1, 0.05]) @ rows
    z, sparsity = g @ torch.linalg.pinv(rows), ed.BatchTopK(0.2)
    live, error = earning(z, g @ rows.T, rows @ rows.T, g.square().sum(), settings(sparsity, 0.02))
    assert live.tolist() == [1, 1, 1, 1, 0, 0]
    for v in range(4):
        fewer = live.clone().index_fill(0, torch.tensor(v), 0)
        assert rebuilt(g, rows, sparsity.keep_batch(z * fewer, 1.0)) - error > 0.02


@pytest.mark.parametrize("tied", [True, False])
def test_of_the_restarts_the_one_with_the_lowest_error_is_kept(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[float] = []

    def noted(*given: Any) -> tuple[Tensor, float]:
        live, error = earning(*given)
        judged.append(error)
        return live, error

    monkeypatch.setattr(fit, "earning", noted)
    d = quick(restarts=4, tied=tied)
    errors = d.history.restarts
    assert errors == judged and len(set(errors)) == 4 and d.decoder.n == 6 and d.history.pruned == []
    assert d.reconstruction_error(X) == pytest.approx(min(errors), abs=0.05)
    others = [quick(restarts=n, tied=tied).history.restarts for n in (2, 3)]
    for fewer in others:  # the same starts, whatever else runs beside them
        assert fewer == pytest.approx(errors[: len(fewer)], rel=1e-3)


def test_the_first_restart_is_the_fit_without_others() -> None:
    alone, first = quick(prune=1e-9), quick(restarts=2, prune=1e-9)
    assert alone.history.restarts[0] == pytest.approx(first.history.restarts[0], rel=1e-3)
    plain = quick()
    assert plain.history.restarts == [] and alone.history.loss == plain.history.loss
    if not alone.history.pruned:
        assert torch.equal(alone.decoder.flat(), plain.decoder.flat()) and alone.threshold == plain.threshold


def test_the_same_seed_gives_the_same_bits_however_many_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one, same, another = (quick(prune=0.05, restarts=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(flat(one), flat(same)) and one.history == same.history and one.threshold == same.threshold
    assert one.history.restarts != another.history.restarts
    monkeypatch.setattr("eigendecomp.factored.samples.CHUNK", 7)
    monkeypatch.setattr("eigendecomp.factored.samples.LITTLE", 0)
    torch.testing.assert_close(one.encode(X, sparse=True), same.encode(X, sparse=True))
    assert one.reconstruction_error(X) == pytest.approx(same.reconstruction_error(X))


def test_restarts_on_live_gradients_are_those_on_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = quick(prune=0.05, restarts=2, reference=ed.Constant(0.0))
    monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    live = quick(prune=0.05, restarts=2, reference=ed.Constant(0.0))
    assert live.history.restarts == pytest.approx(kept.history.restarts, rel=1e-3)
    assert live.history.pruned == kept.history.pruned


@pytest.mark.parametrize("options, words", [
    ({"prune": 0}, "prune .*=0 must be a finite number above 0 and at most 1"),
    ({"prune": 1.5}, "prune .*=1.5 must be"),
    ({"prune": float("nan")}, "prune .*=nan must be"),
    ({"prune": "some"}, "prune .*='some' must be"),
    ({"restarts": 0}, "restarts=0 must be a whole number from 1"),
    ({"restarts": 2.0}, "restarts=2.0 must be a whole number"),
    ({"restarts": True}, "restarts=True must be a whole number"),
])  # fmt: skip
def test_other_values_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quick(**options)


def test_a_pruned_decomposition_is_saved_and_loaded(tmp_path: Path) -> None:
    d = quick(prune=0.1, restarts=2)
    assert d.history.pruned
    d.save(tmp_path / "d.safetensors")
    again = ed.Decomposition.load(tmp_path / "d.safetensors", classifier())
    assert again.history == d.history and again.settings == d.settings
    assert torch.equal(again.encode(X, sparse=True), d.encode(X, sparse=True))


def test_restarts_go_on_where_they_were_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"prune": 0.05, "restarts": 3, "checkpoint": tmp_path / "fit", "checkpoint_seconds": 0}
    whole, end = quick(prune=0.05, restarts=3), State.update
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(State, "update", lambda self, *given: end(self, *given) if self.step < 17 else 1 / 0)
        quick(**options)
    with pytest.raises(ValueError, match=r"settings.restarts: 3 there, 2 here"):
        quick(**{**options, "restarts": 2})
    again = quick(**options)
    assert torch.equal(flat(again), flat(whole)) and again.history == whole.history
