"""A fit that is killed resumes and ends bit-identical; a file that is not right is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.decomposition import Decomposition
from eigendecomp.fit import State
from eigendecomp.support import files
from eigendecomp.support.checkpoint import Checkpoint
from eigendecomp.support.examples import Shuffled

SETTINGS: dict[str, Any] = dict(n_directions=4, steps=60, batch_size=32, progress=False)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))


def inputs() -> torch.Tensor:
    return torch.randn(200, 3, generator=torch.Generator().manual_seed(1))


def same(a: Decomposition, b: Decomposition) -> bool:
    pairs = zip([*a.decoder.tensors(), *a.encoder.tensors()], [*b.decoder.tensors(), *b.encoder.tensors()], strict=True)
    return a.threshold == b.threshold and a.history == b.history and all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of step 20, left by a fit that died at step 37."""
    path, steps = tmp_path / "fit.safetensors", []

    def due(self: Checkpoint) -> bool:
        steps.append(0)
        if len(steps) == 37:
            raise RuntimeError("killed")
        return len(steps) == 20

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "due", due)
        with pytest.raises(RuntimeError, match="killed"):
            ed.decompose(model(), inputs(), checkpoint=path, **SETTINGS)
    return path


def test_resumed_fit_is_bit_identical(interrupted: Path) -> None:
    whole = ed.decompose(model(), inputs(), **SETTINGS)
    resumed = ed.decompose(model(), inputs(), checkpoint=interrupted, **SETTINGS)
    assert same(whole, resumed)
    assert same(whole, ed.decompose(model(), inputs(), checkpoint=interrupted, **SETTINGS))  # nothing is left to do


@pytest.mark.parametrize("settings", [dict(tied=True, sparsity=ed.L1(0.1)), dict(factorization="tucker", rank=2)])
def test_resumed_fit_is_bit_identical_when_live(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    data = torch.utils.data.TensorDataset(inputs())
    whole = ed.decompose(model(), data, **SETTINGS, **settings)
    path = tmp_path / "fit.safetensors"
    monkeypatch.setattr(State, "dead", dies(State.dead, 25))
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    with pytest.raises(RuntimeError, match="killed"):
        ed.decompose(model(), data, checkpoint=path, **SETTINGS, **settings)
    assert same(whole, ed.decompose(model(), data, checkpoint=path, **SETTINGS, **settings))


def dies(function, after: int):
    """The function, which raises the one time that it is called for the ``after``-th time."""
    calls = []

    def wrapped(*args):
        calls.append(0)
        if len(calls) == after:
            raise RuntimeError("killed")
        return function(*args)

    return wrapped


def test_killed_process_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at an arbitrary moment of a fit that writes at every step: the file is whole, and the fit goes on."""
    settings = {**SETTINGS, "steps": 600}
    script = tmp_path / "run.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_storage as t, eigendecomp as ed\n"
        "t.Checkpoint.due = lambda self: True\n"
        f"ed.decompose(t.model(), t.inputs(), checkpoint=sys.argv[2], **{settings})\n"
    )
    path = tmp_path / "fit.safetensors"
    process = subprocess.Popen(
        [sys.executable, script, Path(__file__).parent, path], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tensors, numbers = files.read(path)  # checks the sum
    assert 0 < numbers["step"] < settings["steps"] and tensors
    resumed = ed.decompose(model(), inputs(), checkpoint=path, **settings)
    assert same(resumed, ed.decompose(model(), inputs(), **settings))


@pytest.mark.parametrize("change", [dict(steps=61), dict(seed=1), dict(learning_rate=0.02), dict(tied=True)])
def test_checkpoint_of_other_settings_is_refused(interrupted: Path, change: dict) -> None:
    before = interrupted.read_bytes()
    with pytest.raises(ValueError, match=f"another fit.*{next(iter(change))}"):
        ed.decompose(model(), inputs(), checkpoint=interrupted, **{**SETTINGS, **change})
    assert interrupted.read_bytes() == before


def test_checkpoint_of_another_target_or_data_is_refused(interrupted: Path) -> None:
    other = model()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"another fit.*target"):
        ed.decompose(other, inputs(), checkpoint=interrupted, **SETTINGS)
    with pytest.raises(ValueError, match=r"another fit.*data"):
        ed.decompose(model(), inputs() + 1, checkpoint=interrupted, **SETTINGS)


def test_damaged_checkpoint_is_named(interrupted: Path) -> None:
    whole = interrupted.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]):
        interrupted.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            ed.decompose(model(), inputs(), checkpoint=interrupted, **SETTINGS)


def test_the_interval_between_writes_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes, write = [], Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda self, state: (writes.append(state.step), write(self, state)))
    for seconds, expected in ((0.0, range(2, 61)), (3600.0, [60])):
        monkeypatch.setattr("eigendecomp.support.checkpoint.WRITE_SHARE", 1e9)
        ed.decompose(model(), inputs(), checkpoint=tmp_path / str(seconds), checkpoint_seconds=seconds, **SETTINGS)
        assert set(expected) <= set(writes)
        assert len(writes) <= len(expected) + 1
        writes.clear()
    wrong: Any
    for wrong in (-1.0, float("nan"), "often"):
        with pytest.raises(ValueError, match="checkpoint_seconds"):
            ed.decompose(model(), inputs(), checkpoint=tmp_path / "x", checkpoint_seconds=wrong, **SETTINGS)


def test_missing_folder_is_named_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; make it first"):
        ed.decompose(model(), inputs(), checkpoint=tmp_path / "none" / "fit", **{**SETTINGS, "steps": 10**9})


def test_failed_write_keeps_the_old_file(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of a write costs nothing but the write."""
    before = interrupted.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(interrupted, {"x": torch.zeros(3)}, {})
    assert interrupted.read_bytes() == before
    assert list(interrupted.parent.iterdir()) == [interrupted]


def test_interrupt_returns_what_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    calls = []
    dead = State.dead

    def counted(self: State) -> torch.Tensor:
        calls.append(0)
        return dead(self) if len(calls) < 30 else interrupt()

    monkeypatch.setattr(State, "dead", counted)
    d = ed.decompose(model(), inputs(), **SETTINGS)
    assert d.encode(inputs()[:5]).isfinite().all()
    assert max(d.history.step) < 30


def test_feed_goes_through_all_examples_before_it_begins_again() -> None:
    feed = Shuffled(torch.arange(7.0), 7, torch.Generator().manual_seed(0))
    taken = torch.cat([feed.take(3)[0] for _ in range(7)])
    for start in (0, 7, 14):
        assert sorted(taken[start : start + 7].tolist()) == list(range(7))
