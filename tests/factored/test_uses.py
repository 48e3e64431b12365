"""Uses as samples, against copies of the weight: one for every position, differentiated by ordinary autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp import study

E, T, D = 10, 5, 4


class Sequence(nn.Module):
    """Outputs at every position of a causal mean of a layer; with copies of the weight, one for each position."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(D, 3, generator=generator, dtype=torch.float64))
        self.o = nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
        self.pooled = pooled

    def forward(self, x: Tensor, copies: Tensor | None = None) -> Tensor:
        h = x @ self.w if copies is None else torch.einsum("eti,etio->eto", x, copies)
        h = torch.tanh(h.cumsum(1)) @ self.o
        return h.mean(1) if self.pooled else h


def data(seed: int = 0) -> Tensor:
    x = torch.randn(E, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[2, 1] = 0  # a use without a gradient
    return x


def by_copies(model: Sequence, x: Tensor, loss: Any) -> Tensor:
    """(uses, parameter): the gradient of every copy."""
    copies = model.w.detach().expand(len(x), T, D, 3).clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(model(x, copies)), copies)
    return g.flatten(0, 1).flatten(1)


def fitted(model: nn.Module, x: Tensor, **options: Any) -> ed.Decomposition:
    chosen: dict[str, Any] = {"parameters": ["w"], "samples": "uses", "n_directions": 6, "steps": 30,
                              "batch_size": 20, "progress": False}  # fmt: skip
    return ed.decompose(model, x, **(chosen | options))


def flat(d: ed.Decomposition) -> Tensor:
    return torch.cat([u.flatten(1) for u in d.directions().values()], 1)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("scale", [None, "unit"])
def test_coefficients_of_uses_are_those_of_copies(pooled: bool, scale: Any) -> None:
    model, x = Sequence(pooled), data()
    d = fitted(model, x, reference=ed.Constant(0.5), scale=scale, tied=True)
    g = by_copies(model, x, lambda f: (f - 0.5).square().sum())
    if scale:
        g = nn.functional.normalize(g)
    torch.testing.assert_close(d.encode(x), g @ flat(d).T, rtol=1e-8, atol=1e-10)


def test_the_mean_is_the_reference_and_gives_p_minus_its_mean() -> None:
    model, x = Sequence(), data()
    d = fitted(model, x, divergence=ed.KLDivergence(), tied=True)
    assert d.settings.reference == ed.Mean()
    with torch.no_grad():
        mean = model(x).softmax(-1).flatten(0, 1).mean(0)
    g = by_copies(model, x, lambda f: -(mean * f.log_softmax(-1)).sum())
    torch.testing.assert_close(d.encode(x), g @ flat(d).T, rtol=1e-8, atol=1e-10)


def test_uses_add_up_to_outputs() -> None:
    model, x = Sequence(pooled=True), data()
    d = fitted(model, x, reference=ed.Constant(0.0), tied=True)
    whole = ed.decompose(model, x, reference=ed.Constant(0.0), parameters=["w"], steps=1, tied=True, n_directions=6,
                         progress=False)  # fmt: skip
    whole.encoder = whole.decoder = d.decoder
    torch.testing.assert_close(d.encode(x).unflatten(0, (E, T)).sum(1), whole.encode(x))


def test_the_error_is_that_of_the_formula() -> None:
    model, x = Sequence(), data()
    d = fitted(model, x, reference=ed.Constant(0.5), scale="unit")
    g = nn.functional.normalize(by_copies(model, x, lambda f: (f - 0.5).square().sum()))
    rebuilt = d.encode(x, sparse=True) @ flat(d)
    assert d.reconstruction_error(x) == pytest.approx(float((g - rebuilt).square().sum() / g.square().sum()), rel=1e-8)


def test_impact_takes_every_draw() -> None:
    model, x = Sequence(), data()
    d = fitted(model, x, reference=ed.OtherSample())
    by_hand = []
    draws = 7
    for g in d.gradients(x, draws, 3):
        by_hand.append(g.inner(d.encoder).abs().view(-1, draws, 6).mean(1))
    torch.testing.assert_close(d.impact(x, draws, seed=3), torch.cat(by_hand))
    assert d.impact(x).shape == (E * T, 6)
    assert d.top(x, 4)[1].max() < E * T


def test_held_and_live_uses_have_one_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed reference's uses are captured once; from the same start they reach the same error."""
    model, x = Sequence(), data()
    held = fitted(model, x, steps=300, seed=1)
    monkeypatch.setattr("eigendecomp.factored.samples.HELD_BYTES", 0)
    live = fitted(model, x, steps=300, seed=1)
    assert held.reconstruction_error(x) == pytest.approx(live.reconstruction_error(x), abs=0.05)


def test_files_and_checkpoints_know_uses(tmp_path: Any) -> None:
    model, x = Sequence(), data()
    d = fitted(model, x, scale="unit", checkpoint=tmp_path / "fit.safetensors")
    d.save(tmp_path / "d.safetensors")
    again = ed.Decomposition.load(tmp_path / "d.safetensors", model)
    assert again.settings == d.settings
    torch.testing.assert_close(again.encode(x, sparse=True), d.encode(x, sparse=True))
    resumed = fitted(model, x, scale="unit", checkpoint=tmp_path / "fit.safetensors")
    torch.testing.assert_close(resumed.encode(x), d.encode(x))


def test_patches_of_a_convolution_are_uses() -> None:
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(2, 3, 3, padding=1)
    model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2)).double().eval()
    x = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64)
    d = fitted(model, x, parameters=["0.weight"], reference=ed.Constant(0.0), tied=True)
    whole = torch.stack(
        [torch.autograd.grad(model(x[i : i + 1]).square().sum(), convolution.weight)[0] for i in range(6)]
    )
    found = d.encode(x)
    assert found.shape == (6 * 16, 6)
    torch.testing.assert_close(found.unflatten(0, (6, 16)).sum(1), whole.flatten(1) @ flat(d).T)


def test_readings_and_the_page_take_uses(tmp_path: Any) -> None:
    model, x = Sequence(), data()
    d = fitted(model, x)
    assert study.readings.apply_readers(d, x)["w"].shape == (E, T, 6)
    assert d.activation(x).shape == (E * T, 6)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"samples": "positions"}, "samples='positions' must be 'outputs' or 'uses'"),
        ({"samples": "outputs", "scale": "unit"}, "'unit' with samples='uses'"),
        ({"scale": "norm"}, "scale='norm'"),
        ({"parameters": ["b"]}, "not a weight that multiplies"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], words: str) -> None:
    model = Sequence()
    model.register_parameter("b", nn.Parameter(torch.zeros(2, dtype=torch.float64)))

    def shifted(module: Any, _given: Any, output: Any) -> Any:
        return output + module.b

    model.register_forward_hook(shifted)
    with pytest.raises(ValueError, match=words):
        fitted(model, data(), **options)
