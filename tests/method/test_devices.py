"""A GPU: pretended everywhere, and a real one where there is one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import eigendecomp as ed
from eigendecomp.factored.record import Trace
from eigendecomp.support.checkpoint import Checkpoint
from tests.cases import ConvNet, LanguageModel, Stream
from tests.pretend import GPU, Pretended


class Stop(Exception):
    """Ends a fit between two steps."""


CASES: dict[str, tuple[type[nn.Module], Any]] = {
    "text": (LanguageModel, lambda: torch.randint(7, (12, 5))),
    "images": (ConvNet, lambda: torch.randn(12, 1, 6, 5)),
}
FIT: dict[str, Any] = dict(
    n_directions=4, steps=4, batch_size=20, sparsity=ed.BatchTopK(0.5), divergence=ed.KLDivergence(), progress=False
)


@pytest.fixture
def gpu() -> Iterator[Pretended]:
    torch.manual_seed(0)
    with Pretended(Trace) as device:
        yield device


def test_the_pretended_device_refuses_what_a_gpu_refuses(gpu: Pretended) -> None:
    here, there = gpu.put(torch.ones(3)), torch.ones(3)
    assert here.device == GPU and there.device.type == "cpu" and (here * 2).device == GPU
    for meet in (lambda: here + there, lambda: here @ there, lambda: torch.cat([here, there]), lambda: there[here > 0]):
        with pytest.raises(RuntimeError, match="same device"):
            meet()
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()
    assert (here + torch.tensor(1.0)).device == GPU and here[torch.tensor([0, 2])].device == GPU
    assert (here + there.to(here.device)).device == (here + there.to(here)).device == GPU
    assert torch.zeros(2, device=GPU).device == torch.empty_like(here).device == here.new_zeros(2).device == GPU
    assert (here.cpu() + there).device == here.to("cpu").device == torch.device("cpu")
    assert gpu.fetched == [(3,), (3,)]
    there.copy_(here)
    assert there.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, reference, cached",
    [("text", ed.OtherSample(), False), ("images", ed.ModelSample(), True), ("images", ed.Mean(), False)],
)
def test_everything_runs_on_a_gpu(
    case: str, reference: Any, cached: bool, tmp_path: Path, gpu: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fit, readings, save and load, readings again; with inputs on the CPU or on the device."""
    if not cached:
        monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    make, inputs = CASES[case]
    model, x = gpu.move(make().eval()), inputs()
    for start, place in (("random", x), ("samples", gpu.put(x.clone()))):
        d = ed.decompose(model, place, reference=reference, **FIT, start=start)  # type: ignore[arg-type]
        d.save(tmp_path / "d.safetensors")
        again = ed.Decomposition.load(tmp_path / "d.safetensors", model)
        for one in (d, again):
            assert all(factor.device == GPU for factor in one.decoder.tensors())
            read = (one.encode(place), one.activation(place), one.impact(place, 2), one.top(place, 3)[0])
            assert all(values.device == GPU for values in read)
            assert one.reconstruction_error(place) < 4
            assert ed.interactions(one, place).device == GPU
            with one.perturbed({0: 0.5}) as moved:
                moved(place.to(GPU))
        torch.testing.assert_close(d.encode(place), again.encode(place))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map-style", "iterable", "tensors"])
def test_a_fit_goes_on_from_its_checkpoint_on_a_gpu(
    kind: str, tmp_path: Path, gpu: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    model, x = gpu.move(LanguageModel().eval()), torch.randint(7, (12, 5))
    data = {"map-style": TensorDataset(x), "iterable": Stream(x), "tensors": x}[kind]
    path = tmp_path / "fit.safetensors"
    whole = ed.decompose(model, data, **FIT)

    write = Checkpoint.write

    def stop(self: Checkpoint, state: Any) -> None:
        write(self, state)
        if state.step == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Checkpoint, "write", stop)
        patch.setattr(Checkpoint, "due", lambda self: True)
        ed.decompose(model, data, checkpoint=path, **FIT)
    resumed = ed.decompose(model, data, checkpoint=path, **FIT)
    assert resumed.history.loss == whole.history.loss
    for a, b in zip(resumed.decoder.tensors(), whole.decoder.tensors(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_a_step_fetches_nothing_large(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of references stays on the device while the fit goes on."""
    monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    model, x = gpu.move(LanguageModel().eval()), gpu.put(torch.randint(7, (12, 5)))
    fetched = []
    for steps in (2, 4):
        gpu.fetched.clear()
        ed.decompose(model, x, **{**FIT, "steps": steps})
        fetched.append(len([shape for shape in gpu.fetched if len(shape) > 1]))
    assert fetched[0] == fetched[1]


@pytest.mark.slow
def test_a_step_seldom_waits_for_the_device(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks of the guard, a step waits a few times, however many layers the model has."""
    monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    model, x = gpu.move(LanguageModel().eval()), gpu.put(torch.randint(7, (12, 5)))
    waits = []
    for steps in (10, 13):
        gpu.waits.clear()
        ed.decompose(model, x, **{**FIT, "steps": steps})
        waits.append(list(gpu.waits))
    assert len(waits[0]) < len(waits[1]) <= len(waits[0]) + 3 * 5, waits[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here; the pretended one is tested above")
def test_everything_runs_on_a_real_gpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = LanguageModel().eval(), torch.randint(7, (12, 5))
    slow = ed.decompose(model, x, **FIT)
    d = ed.decompose(model.cuda(), x, **FIT)
    d.save(tmp_path / "d.safetensors")
    again = ed.Decomposition.load(tmp_path / "d.safetensors", model)
    torch.testing.assert_close(d.encode(x).cpu(), slow.encode(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.activation(x.cuda()), d.activation(x))
