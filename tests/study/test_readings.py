"""Readers and writers rebuild the directions; factors are those of single uses."""

import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.study import readings
from tests.cases import Heads


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 3, 3, bias=False), nn.Linear(3 * 16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.conv(x)).flatten(1))


def small(model: nn.Module, x: torch.Tensor, **options) -> ed.Decomposition:
    settings = {"parameters": ["conv.weight"] if isinstance(model, Patches) else ["W_*"], "rank": 1} | options
    return ed.decompose(
        model.eval(), x, divergence=ed.KLDivergence(), reference=ed.ModelSample(), n_directions=4, steps=3,
        batch_size=16, progress=False, **settings,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_readers_and_writers_rebuild_directions(side) -> None:
    x = torch.randn(8, 6, 5)
    d = small(Heads(), x, rank=2)
    reader, writer = readings.readers(d, x, side), readings.writers(d, x, side)
    rows = getattr(d, side)
    k = torch.einsum("vko,vki->voi", writer["W_K"], reader["W_K"]).unflatten(1, (3, 2)).mT
    torch.testing.assert_close(k, rows.dense("W_K"))
    o = torch.einsum("vki,vko->vio", reader["W_O"], writer["W_O"]).unflatten(1, (3, 2))
    torch.testing.assert_close(o, rows.dense("W_O"))


@pytest.mark.parametrize("count", [1, 70])
def test_read_applies_readers_to_what_the_weight_meets(count) -> None:
    x = torch.randn(70, 6, 5)
    d = small(Heads(), x)
    found = readings.apply_readers(d, x[:count])["W_K"]
    torch.testing.assert_close(found, x[:count] @ readings.readers(d, x)["W_K"][:, 0].T)
    higher = small(Heads(), x, rank=2)
    values = torch.einsum("etd,vkd->etvk", x, readings.readers(higher, x)["W_V"]).norm(dim=-1)
    torch.testing.assert_close(readings.apply_readers(higher, x)["W_V"], values)


def test_read_meets_patches() -> None:
    x = torch.randn(5, 2, 6, 6)
    d = small(Patches(), x)
    expected = nn.functional.conv2d(x, readings.readers(d, x)["conv.weight"][:, 0].unflatten(1, (2, 3, 3)))
    torch.testing.assert_close(readings.apply_readers(d, x)["conv.weight"], expected.flatten(2).mT)


def test_a_bias_has_no_positions() -> None:
    x = torch.randn(8, 3)
    d = small(nn.Sequential(nn.Linear(3, 4)), x, parameters=["*"])
    with pytest.raises(ValueError, match=r"0\.bias.*weights alone"):
        readings.apply_readers(d, x)
    with pytest.raises(ValueError, match="side='left'"):
        readings.apply_readers(d, x, "left")


def test_factors_are_those_of_single_uses_and_sum_to_gradients() -> None:
    model, x = Heads().eval(), torch.randn(5, 6, 5)
    group = {"W_[KV]": "head model d -> (head d) model"}
    found = readings.factors(model, x, divergence=ed.KLDivergence(), parameters=["W_K", "W_V"], group=group)
    with torch.no_grad():
        mean = model(x).softmax(-1).flatten(0, 1).mean(0)
    model.requires_grad_()
    for i in range(len(x)):  # one example at a time
        loss = -(mean * model(x[i : i + 1]).log_softmax(-1)).sum()
        for name, g in zip(("W_K", "W_V"), torch.autograd.grad(loss, [model.W_K, model.W_V]), strict=True):
            arrived, asked = (side.unflatten(0, (5, 6))[i] for side in found[name])
            torch.testing.assert_close(arrived, x[i])
            torch.testing.assert_close(torch.einsum("ti,to->oi", arrived, asked), g.movedim(2, 1).flatten(0, 1))


def test_factors_at_unit_norm_have_the_coefficients_of_the_front_door() -> None:
    model, x = Heads().eval(), torch.randn(5, 6, 5)
    options = {"divergence": ed.KLDivergence(), "parameters": ["W_V"], "scale": "unit"}
    ((arrived, asked),) = readings.factors(model, x, **options).values()
    torch.testing.assert_close(arrived.norm(dim=1) * asked.norm(dim=1), torch.ones(30))
    d = ed.decompose(model, x, samples="uses", n_directions=3, steps=2, progress=False, tied=True, **options)
    rows = d.directions()["W_V"].movedim(3, 2).flatten(1, 2)  # (v, out, in)
    torch.testing.assert_close(d.encode(x), torch.einsum("ni,no,voi->nv", arrived, asked, rows))


def test_factors_refuse_what_does_not_multiply() -> None:
    with pytest.raises(ValueError, match=r"0\.bias"):
        model = nn.Sequential(nn.Linear(5, 4))
        readings.factors(model, torch.randn(8, 6, 5), divergence=ed.KLDivergence(), parameters=["*"])
