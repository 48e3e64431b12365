"""A store of gradients against autograd, one example at a time, and against fits that capture them live."""

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import eigendecomp as ed
from eigendecomp.factored.record import Trace
from tests.cases import ConvNet, LanguageModel, Stream
from tests.pretend import GPU, Pretended

SQUARED = ed.SquaredError()


class Items(Dataset):
    """A dataset that notes what it was asked for."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.asked = x, []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        self.asked.append(i)
        return self.x[i]


def reader() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return LanguageModel().double().eval(), torch.randint(7, (12, 5))


def seer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return ConvNet().double().eval(), torch.randn(12, 1, 8, 8, dtype=torch.float64)


CASES = {"text": reader, "images": seer}
SMALL: dict[str, Any] = dict(file_bytes=2000, progress=False)


def collected(case: tuple[nn.Module, Any], path: Path, **options: Any) -> ed.GradientStore:
    return ed.GradientStore.collect(*case, path=path, **(SMALL | options))


def rows(store: ed.GradientStore, numbers: Any = None) -> Tensor:
    return store.gradients(range(len(store)) if numbers is None else numbers).flat()


def by_autograd(model: nn.Module, x: Tensor, cotangent: Any) -> Tensor:
    """(samples, parameters): a backward pass for every output of every example alone; ``cotangent`` of its number."""
    found, number = [], 0
    for example in x:
        f = model(example[None]).reshape(-1, model(example[None]).shape[-1])
        for row in f:
            c = cotangent(row.detach(), number)
            g = torch.autograd.grad(row, list(model.parameters()), c, retain_graph=True)
            found.append(torch.cat([part.flatten() for part in g]))
            number += 1
    return torch.stack(found)


# ---- what is stored


@pytest.mark.parametrize("case", CASES)
def test_stored_gradients_are_autograds(case: str, tmp_path: Path) -> None:
    model, x = CASES[case]()
    store = collected((model, x), tmp_path / "s", reference=ed.Constant(0.5))
    assert len(list((tmp_path / "s").iterdir())) > 2
    torch.testing.assert_close(rows(store), by_autograd(model, x, lambda f, _: 2 * (f - 0.5)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_drawn_references_are_of_the_pool_and_differ(case: str, tmp_path: Path) -> None:
    model, x = CASES[case]()
    store = collected((model, x), tmp_path / "s", divergence=ed.KLDivergence(), draws=3)
    each = [by_autograd(model, x, lambda f, _, q=q: f.softmax(-1) - q) for q in store.pool]
    apart = torch.cdist(
        rows(store).view(-1, 3, each[0].shape[1]), torch.stack(each, 1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert len(store) == 3 * len(each[0]) and apart.amin(2).max() < 1e-10
    assert apart.argmin(2).unique().numel() > len(store.pool) // 2


def test_uses_are_the_terms_of_outputs(tmp_path: Path) -> None:
    model, x = reader()
    options: dict[str, Any] = dict(parameters=["mix.weight"], reference=ed.Constant(0.0))
    uses = collected((model, x), tmp_path / "u", samples="uses", **options)
    outputs = collected((model, x), tmp_path / "o", **options)
    totals = [rows(store).view(len(x), -1, 36).sum(1) for store in (uses, outputs)]
    torch.testing.assert_close(*totals, rtol=1e-10, atol=1e-12)
    unit = rows(collected((model, x), tmp_path / "n", samples="uses", scale="unit", **options))
    torch.testing.assert_close(unit, nn.functional.normalize(rows(uses)), rtol=1e-10, atol=1e-12)


def test_neither_order_nor_batch_nor_files_change_a_gradient(tmp_path: Path) -> None:
    case = reader()
    store = collected(case, tmp_path / "s", reference=ed.Constant(0.5))
    whole, order = rows(store), torch.randperm(len(store))
    torch.testing.assert_close(rows(store, order), whole[order], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([rows(store, [i]) for i in order[:7].tolist()]), whole[order[:7]])
    large = collected(case, tmp_path / "l", reference=ed.Constant(0.5), file_bytes=1 << 20)
    assert len(list((tmp_path / "l").iterdir())) == 2
    torch.testing.assert_close(rows(large), whole, rtol=1e-12, atol=1e-14)
    for inputs in (Items(case[1]), Stream(case[1])):
        one = collected((case[0], inputs), tmp_path / type(inputs).__name__, reference=ed.Constant(0.5))
        torch.testing.assert_close(rows(one), whole, rtol=1e-12, atol=1e-14)


def test_inputs_that_samples_share_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = reader()
    store = collected((model, x), tmp_path / "s", parameters=["mix.weight"], progress=True)
    said = int(capsys.readouterr().out.split(" bytes a sample")[0].split()[-1])
    assert said == (5 * 6 + 5 * 5 * 6) * 8 / 5  # inputs of 5 positions once, output gradients for every sample
    assert sum(path.stat().st_size for path in (tmp_path / "s").glob("0*")) == pytest.approx(said * 60, rel=0.5)
    assert f"{said} bytes each" in str(store)


# ---- fits


@pytest.mark.parametrize("case", CASES)
def test_with_a_fixed_reference_the_fit_is_the_live_one(case: str, tmp_path: Path) -> None:
    model, x = CASES[case]()
    fit: dict[str, Any] = dict(n_directions=4, steps=30, batch_size=12, seed=3, progress=False)
    store = collected((model, x), tmp_path / "s", reference=ed.Constant(0.5))
    live = ed.decompose(model, x, reference=ed.Constant(0.5), **fit)
    assert same(store.decompose(**fit), live)


def test_of_uses_the_fit_is_the_live_one(tmp_path: Path) -> None:
    model, x = reader()
    options: dict[str, Any] = dict(parameters=["mix.weight"], samples="uses", divergence=ed.KLDivergence())
    fit: dict[str, Any] = dict(n_directions=4, steps=30, batch_size=20, seed=3, progress=False)
    store = collected((model, x), tmp_path / "s", **options)
    assert same(store.decompose(**fit), ed.decompose(model, x, **options, **fit))


def same(a: ed.Decomposition, b: ed.Decomposition) -> bool:
    pairs = zip(a.directions().values(), b.directions().values(), strict=True)
    close = all(torch.allclose(one, other, rtol=1e-6, atol=1e-8) for one, other in pairs)
    return close and a.threshold == pytest.approx(b.threshold) and a.history.error == pytest.approx(b.history.error)


def test_what_comes_out_is_a_decomposition_like_any_other(tmp_path: Path) -> None:
    model, x = reader()
    store = collected((model, x), tmp_path / "s", divergence=ed.KLDivergence(), draws=2)
    for seed, rank, sparsity in ((0, 1, ed.BatchTopK(0.5)), (1, 2, ed.L1(0.01))):
        d = store.decompose(n_directions=4, rank=rank, sparsity=sparsity, steps=5, batch_size=16, seed=seed,
                            progress=False)  # fmt: skip
        d.save(tmp_path / "d")
        again = ed.Decomposition.load(tmp_path / "d", model)
        torch.testing.assert_close(again.encode(x), d.encode(x), rtol=0, atol=0)
        assert d.impact(x).shape == d.activation(x).shape == (60, 4) and d.settings.seed == seed
        assert 0 < d.reconstruction_error(x) < 2 and d.pool.equal(store.pool)


def test_the_held_out_error_is_that_of_a_live_fit(tmp_path: Path) -> None:
    from eigendecomp.targets.toys import tms

    toy, _ = tms.train(5, 2, tied=True, seed=0, instances=4)
    x, unseen = (tms.data(4096, 5, torch.Generator().manual_seed(seed), none_empty=True) for seed in (1, 2))
    fit: dict[str, Any] = dict(n_directions=5, steps=400, learning_rate=0.03, progress=False)
    store = ed.GradientStore.collect(toy, x, path=tmp_path / "s", draws=2, progress=False)
    errors = [d.reconstruction_error(unseen) for d in (store.decompose(**fit), ed.decompose(toy, x, **fit))]
    assert errors[0] == pytest.approx(errors[1], abs=0.03)


def test_an_interrupted_fit_goes_on(tmp_path: Path) -> None:
    store = collected(reader(), tmp_path / "s")
    fit: dict[str, Any] = dict(n_directions=3, batch_size=16, progress=False, steps=12)
    whole = store.decompose(**fit)
    path = tmp_path / "fit"
    store.decompose(**fit, checkpoint=path)
    assert same(store.decompose(**fit, checkpoint=path), whole)
    other = collected(reader(), tmp_path / "o", seed=1)
    with pytest.raises(ValueError, match=r"of another fit \(store.settings.seed: 0 there, 1 here"):
        other.decompose(**fit, checkpoint=path)


def test_on_a_pretended_gpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = LanguageModel().eval(), torch.randint(7, (12, 5))
    with Pretended(Trace):
        model.to(GPU)
        store = collected((model, x), tmp_path / "s", divergence=ed.KLDivergence())
        d = store.decompose(n_directions=4, steps=3, batch_size=20, progress=False)
        assert all(u.device == GPU for u in d.directions().values()) and d.encode(x).shape == (60, 4)


# ---- interrupted, damaged, foreign

KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {here!r})
import eigendecomp as ed
from tests.store.test_store import Items, reader, collected

class Deadly(Items):
    def __getitem__(self, i):
        if i == 8 and len(self.asked) > 12 + 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)

model, x = reader()
collected((model, Deadly(x)), {path!r})
"""


def test_a_killed_collection_goes_on(tmp_path: Path) -> None:
    here = str(Path(__file__).resolve().parents[2])
    code = KILLED.format(here=here, path=str(tmp_path / "s"))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": here}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    model, x = reader()
    with pytest.raises(ValueError, match=r"not complete.*collect again"):
        ed.GradientStore.open(tmp_path / "s", model)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("0*")}
    store = collected((model, Items(x)), tmp_path / "s")
    assert 0 < len(written) < len(list((tmp_path / "s").glob("0*")))
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    torch.testing.assert_close(rows(store), rows(collected((model, Items(x)), tmp_path / "whole")), rtol=0, atol=0)


def test_a_damaged_file_is_refused_and_can_be_made_again(tmp_path: Path) -> None:
    model, x = reader()
    whole = rows(collected((model, x), tmp_path / "s"))
    shard = tmp_path / "s" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(bytes(content))
    for call in (lambda: ed.GradientStore.open(tmp_path / "s", model), lambda: collected((model, x), tmp_path / "s")):
        with pytest.raises(ValueError, match=r"00001.*damaged.*delete that file and call GradientStore.collect again"):
            call()
    shard.unlink()
    torch.testing.assert_close(rows(collected((model, x), tmp_path / "s")), whole, rtol=0, atol=0)
    other = collected((model, x), tmp_path / "o", seed=1)
    assert not rows(other).equal(whole)
    shard.write_bytes((tmp_path / "o" / shard.name).read_bytes())
    with pytest.raises(ValueError, match=r"00001.*is a shard of another store: delete that file"):
        ed.GradientStore.open(tmp_path / "s", model)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    model, x = reader()
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "00000.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="folder of something else"):
        collected((model, x), tmp_path / "f")
    assert (tmp_path / "f" / "00000.safetensors").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file"):
        collected((model, x), tmp_path / "f" / "00000.safetensors")
    with pytest.raises(ValueError, match="does not exist; make it first"):
        collected((model, x), tmp_path / "no" / "s")
    with pytest.raises(ValueError, match="not a store of gradients"):
        ed.GradientStore.open(tmp_path / "f", model)


def test_another_store_is_refused_with_what_differs(tmp_path: Path) -> None:
    model, x = reader()
    collected((model, x), tmp_path / "s")
    for told, (inputs, options) in {
        "settings.seed: 0 there, 1 here": (x, {"seed": 1}),
        "draws: 1 there, 2 here": (x, {"draws": 2}),
        "settings.parameters": (x, {"parameters": ["mix.*"]}),
        "data: ": (x.flip(0), {}),
    }.items():
        with pytest.raises(ValueError, match=f"store of other gradients.*{told}"):
            collected((model, inputs), tmp_path / "s", **options)
    with torch.no_grad():
        model.get_parameter("mix.weight").add_(0.1)
    with pytest.raises(ValueError, match=r"store of other gradients.*target"):
        collected((model, x), tmp_path / "s")
    with pytest.raises(ValueError, match="other weights of the same shapes"):
        ed.GradientStore.open(tmp_path / "s", model)


def test_weights_that_change_after_are_noticed(tmp_path: Path) -> None:
    model, x = reader()
    store = collected((model, x), tmp_path / "s")
    with torch.no_grad():
        model.get_parameter("mix.weight").add_(0.1)
    with pytest.raises(ValueError, match="not those whose gradients are stored"):
        store.decompose(steps=1, progress=False)


def test_what_a_store_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = reader()
    with pytest.raises(ValueError, match=r"draws=2.*same gradient every time"):
        collected((model, x), tmp_path / "s", reference=ed.Constant(0.0), draws=2)
    with pytest.raises(ValueError, match="draws=0"):
        collected((model, x), tmp_path / "s", draws=0)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="precision of the target"):
        collected((model, x), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    monkeypatch.undo()
    store = collected((model, x), tmp_path / "s")
    with pytest.raises(IndexError, match="0 to 59"):
        store.gradients([60])
    with pytest.raises(ValueError, match="rank"):
        store.decompose(rank=0)


def test_a_stores_fit_takes_the_settings_of_the_front_door_with_the_same_defaults() -> None:
    own, door = (inspect.signature(call).parameters for call in (ed.GradientStore.decompose, ed.decompose))
    shared = [name for name in own if name != "self"]
    assert len(shared) == 15 and [name for name in door if name in own] == shared
    assert all(own[name] == door[name] for name in shared)
