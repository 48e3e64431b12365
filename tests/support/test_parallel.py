"""Two processes on the halves of a batch take the same step as one process on the whole."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eigendecomp as ed
from eigendecomp.factored.source import CapturedSource
from eigendecomp.gradients import FunctionalSource
from eigendecomp.support import files
from eigendecomp.target import Target
from rooms.cost import sizes

SCRIPT = """
import sys, torch, eigendecomp as ed
from eigendecomp.factored import data as reading
from eigendecomp.fit import State
from eigendecomp.support.checkpoint import Checkpoint
from eigendecomp.support.parallel import leads
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU(), torch.nn.Linear(5, 3)).double()
x = torch.randn(300, 3, generator=torch.Generator().manual_seed(1)).double()
out, checkpoints, dies = sys.argv[1], sys.argv[2], sys.argv[3] == "dies"
found, written = {}, []
cases = {
    "cached": dict(),
    "live": dict(cache=0),
    "dataset": dict(cache=0, data=torch.utils.data.TensorDataset(x)),
    "l1": dict(sparsity=ed.L1(0.05), tied=True, reference=ed.Constant(0.0)),
    "best": dict(prune=0.05, restarts=2),
    "at samples": dict(start="samples", restarts=2, rank=2),
}
if dies:  # in step 20, some steps after the last checkpoint
    step, written = State.update, []
    Checkpoint.due = lambda self: len(written) == 10
    def update(self, *given):
        written.append(0)
        if self.step == 20:
            written.clear()
            raise InterruptedError
        return step(self, *given)
    State.update = update
for name, case in cases.items():
    reading.CACHE_BYTES = case.pop("cache", 1 << 28)
    data = case.pop("data", x)
    checkpoint = f"{checkpoints}/{name}"
    settings = dict(n_directions=6, steps=30, batch_size=32, progress=False, checkpoint=checkpoint)
    try:
        d = ed.decompose(model, data, **settings, **case)
    except InterruptedError:
        continue
    found[name] = torch.cat([d.decoder.flat(), d.encoder.flat()])
    found[name + " threshold"] = torch.tensor(d.threshold or 0.0, dtype=torch.float64)
    found[name + " error"] = torch.tensor(d.history.error, dtype=torch.float64)
    found[name + " loss"] = torch.tensor(d.history.loss, dtype=torch.float64)
if leads():
    torch.save(found, out)
"""


def run(processes: int, folder: Path, checkpoints: str, end: str = "lives") -> dict[str, torch.Tensor]:
    script, out = folder / "script.py", folder / "out.pt"
    script.write_text(SCRIPT)
    (folder / checkpoints).mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = list(launcher) if processes > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(script), str(out), str(folder / checkpoints), end]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_go_on_where_it_died(tmp_path: Path) -> None:
    one, others = run(1, tmp_path, "one"), {"two": run(2, tmp_path, "two")}
    for before, after in ((1, 2), (2, 1)):
        killed = f"killed in {before}"
        assert not run(before, tmp_path, killed, "dies")
        assert {files.read(checkpoint)[1]["step"] for checkpoint in (tmp_path / killed).iterdir()} == {11}
        others[killed] = run(after, tmp_path, killed)
    assert one
    for other, found in others.items():
        for name, value in one.items():
            assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max().clamp_min(1), (other, name)


class Ones:
    """The gradient of the sum of a sample's even outputs."""

    def __call__(self, f: torch.Tensor) -> torch.Tensor:
        return (torch.arange(f.shape[-1]) % 2 == 0).to(f).expand(*f.shape[:2], 1, f.shape[-1])

    def __getitem__(self, rows: slice) -> "Ones":
        return self


def language_model() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return sizes.Transformer(64, 32, 4, 2, 16).eval(), torch.randint(64, (16, 8))


def test_passes_in_half_precision_give_the_same_gradients_to_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = language_model()
    target = Target(model)
    c = Ones()
    exact = FunctionalSource(target)((tokens,), c).flat()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    source = CapturedSource(target, (tokens,))
    coarse = source((tokens,), c).flat()
    assert not source.fallback
    assert coarse.dtype == torch.float32
    assert 1e-4 < (coarse - exact).norm() / exact.norm() < 0.03


def test_a_fit_in_half_precision_reaches_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = language_model()
    settings: dict[str, Any] = dict(
        divergence=ed.KLDivergence(), n_directions=8, steps=60, batch_size=64, progress=False
    )
    exact = ed.decompose(model, tokens, **settings)
    error = exact.reconstruction_error(tokens)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    coarse = ed.decompose(model, tokens, **settings)
    assert coarse.decoder.norms().dtype == coarse.activation(tokens).dtype == torch.float32
    assert coarse.reconstruction_error(tokens) == pytest.approx(error, abs=0.02)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"'fp16' is not supported.*use 'bf16' or 'no'"):
        ed.decompose(model, tokens, **settings)
