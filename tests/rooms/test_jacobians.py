"""What is read from Jacobians is what the decomposition reads gradient by gradient."""

import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.curvature import hessian_root
from eigendecomp.decomposition import Decomposition
from eigendecomp.study.scores import gradient_rows
from eigendecomp.target import Target
from rooms.fashion import jacobians


@pytest.fixture(scope="module")
def case() -> tuple[Decomposition, torch.Tensor, jacobians.Jacobians]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(40, 4)
    d = ed.decompose(
        model, x, divergence=ed.KLDivergence(), reference=ed.Uniform(), parameters=["0.*"], n_directions=5,
        steps=5, batch_size=16, progress=False,
    )  # fmt: skip
    return d, x, jacobians.read(d.target, x, {"in": d.encoder.flat(), "out": d.decoder.flat()})


def test_impact_and_its_share(case) -> None:
    d, x, seen = case
    c = (seen.f.softmax(-1) - 1 / 3).unsqueeze(1)
    z = d.encode(x).abs()
    torch.testing.assert_close(seen.impact("in", c), z)
    norm = gradient_rows(d, x).norm(dim=1, keepdim=True)
    torch.testing.assert_close(seen.impact("in", c, share=True), z / norm)


def test_activation_and_its_share(case) -> None:
    d, x, seen = case
    torch.testing.assert_close(seen.activation("out"), d.activation(x))
    trace = hessian_root(d.target.model, x, ed.KLDivergence(), parameters=["0.*"]).square().sum((1, 2))
    torch.testing.assert_close(seen.activation("out", share=True), d.activation(x) / trace.sqrt().unsqueeze(1))
    assert seen.activation("out", share=True).max() <= 1 + 1e-6


def test_logit_moves_ignore_what_the_model_predicts(case) -> None:
    _, _, seen = case
    y = seen.along["out"]
    expected = (y - y.mean(1, keepdim=True)).square().mean(1).sqrt()
    torch.testing.assert_close(seen.logit_move("out"), expected)
    assert seen.logit_move("out", share=True).max() <= 1 + 1e-6


def test_share_of_the_trace_in_a_span(case) -> None:
    d, x, seen = case
    roots = hessian_root(d.target.model, x, ed.KLDivergence(), parameters=["0.*"]).double()  # H = rootᵀ root
    rows, held, largest = d.decoder.flat(), seen.held("out", d.decoder.flat(), (1, 2, 3)), seen.largest((1, 2))
    for n, root in enumerate(roots):
        order = (root @ rows.double().T).square().sum(0).argsort(descending=True)
        for count in (1, 2, 3):
            q = torch.linalg.qr(rows[order[:count]].double().T).Q
            expected = (root @ q).square().sum() / root.square().sum()
            torch.testing.assert_close(held[count][n], expected, rtol=1e-4, atol=1e-6)
        values = torch.linalg.svdvals(root).square()
        torch.testing.assert_close(largest[1][n], values[0] / values.sum(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(largest[2][n], torch.tensor(1.0).double(), rtol=1e-4, atol=1e-6)  # H has two axes


def test_outputs_with_positions_are_refused() -> None:
    model = nn.Linear(4, 3)
    target = Target(model, ["*"])
    with pytest.raises(ValueError, match="5 output vectors an example"):
        jacobians.read(target, torch.randn(6, 5, 4), {"u": torch.randn(2, 15)})
