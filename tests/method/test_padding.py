"""A padded row has no derivative in a lookup, however it is asked: as ordinary ``backward()`` says, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eigendecomp as ed
from eigendecomp.curvature import hessian_root, push_forward
from tests.cases import Model

TOKENS = torch.tensor([[0, 2, 1, 0], [3, 0, 0, 1], [4, 4, 2, 3], [0, 0, 0, 0], [1, 0, 4, 2]])


def module(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.table(x)).mean(1))


def behind(m: Any, x: Tensor) -> Tensor:
    """Layers behind the table, and an output at every position."""
    h = m.norm(m.table(x) + m.first(torch.tanh(m.table(x))))
    return m.out(torch.tanh(h.cumsum(1)))


def functional(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.tanh(F.embedding(x, m.rows, padding_idx=-5)).mean(1))


def low_level(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.tanh(torch.embedding(m.rows, x, 0)).mean(1))


def tied(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.table(x)).cumsum(1) @ m.table.weight.T


def twice(m: Any, x: Tensor) -> Tensor:
    """With the padding and without."""
    return m.out(torch.tanh(m.table(x) * F.embedding(x, m.table.weight)).mean(1))


def bag(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.table(x)))


def table() -> nn.Embedding:
    made = nn.Embedding(5, 3, padding_idx=0)
    nn.init.normal_(made.weight)  # a padded row need not be zero
    return made


MODELS = {
    "module": lambda: Model(module, table=table(), out=nn.Linear(3, 2)),
    "behind": lambda: Model(behind, table=table(), norm=nn.LayerNorm(3), first=nn.Linear(3, 3), out=nn.Linear(3, 2)),
    "functional": lambda: Model(functional, rows=torch.randn(5, 3), out=nn.Linear(3, 2)),
    "low level": lambda: Model(low_level, rows=torch.randn(5, 3), out=nn.Linear(3, 2)),
    "tied": lambda: Model(tied, table=table()),
    "twice": lambda: Model(twice, table=table(), out=nn.Linear(3, 2)),
    "bag": lambda: Model(bag, table=nn.EmbeddingBag(5, 3, mode="sum", padding_idx=0), out=nn.Linear(3, 2)),
    "mean of a bag": lambda: Model(bag, table=nn.EmbeddingBag(5, 3, padding_idx=0), out=nn.Linear(3, 2)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def fitted(name: str) -> tuple[nn.Module, ed.Decomposition, Tensor, Tensor]:
    """A model, directions that move the padded row too, J of every sample by ``backward()``, and J u."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    d = ed.decompose(
        model, TOKENS, reference=ed.Constant(0.3), n_directions=4, steps=3, batch_size=8, tied=True, progress=False
    )
    jacobians = []
    for tokens in TOKENS:
        f = model(tokens[None]).flatten(0, -2)
        for position in f:
            rows = []
            for output in position:
                model.zero_grad()
                output.backward(retain_graph=True)
                rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            jacobians.append(torch.stack(rows))
    u = torch.cat([value.flatten(1) for value in d.directions().values()], 1)
    padded = d.directions()["rows" if hasattr(model, "rows") else "table.weight"][:, 0]
    assert padded.abs().amin() > 1e-4  # else there would be nothing to see
    j = torch.stack(jacobians)
    return model, d, j, torch.einsum("nkw,vw->nvk", j, u)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_model
def test_derivatives_along_directions_are_backwards(name: str) -> None:
    model, d, j, moved = fitted(name)
    root = 2**0.5  # of S, for a squared error
    same(push_forward(d.target, ed.SquaredError(), d.decoder, (TOKENS,)), root * moved)
    same(push_forward(d.target, ed.SquaredError(), d.decoder, (TOKENS,), source=d.captured((TOKENS,))), root * moved)
    same(d.activation(TOKENS), root * moved.norm(dim=-1))
    same(hessian_root(model, TOKENS, ed.SquaredError()), root * j)
    curvature = 2 * torch.einsum("nvk,nwk->vw", moved, moved)
    scale = curvature.diagonal().sqrt()
    same(ed.interactions(d, TOKENS), curvature / scale.outer(scale))


@every_model
def test_coefficients_are_products_with_backwards_gradients(name: str) -> None:
    model, d, _, moved = fitted(name)
    with torch.no_grad():
        residual = 2 * (model(TOKENS) - 0.3).flatten(0, -2)
    z = torch.einsum("nvk,nk->nv", moved, residual)
    same(d.encode(TOKENS), z)
    same(d.impact(TOKENS), z.abs())


@every_model
def test_a_small_step_moves_the_outputs_by_the_derivative(name: str) -> None:
    model, d, _, moved = fitted(name)
    step = 1e-5
    before = model(TOKENS)
    for v in range(4):
        with torch.no_grad(), d.perturbed({v: step}) as ahead:
            forth = ahead(TOKENS)
        with torch.no_grad(), d.perturbed({v: -step}) as behind:
            back = behind(TOKENS)
        same(((forth - back) / (2 * step)).flatten(0, -2), moved[:, v], 1e-8)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("name", [name for name in MODELS if "bag" not in name])
def test_second_derivatives_leave_the_row_out_as_well(name: str) -> None:
    model, _, j, _ = fitted(name)
    hessian = ed.per_sample_hessian(model, TOKENS, ed.SquaredError(), method="autograd")
    same(hessian, 2 * j.mT @ j, 1e-9)


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_lookups_whose_gradient_is_no_dense_derivative_are_refused(kind: Any, option: str) -> None:
    options: dict[str, Any] = {option: True}
    model = Model(bag if kind is nn.EmbeddingBag else module, table=kind(5, 3, **options), out=nn.Linear(3, 2))
    for asked in (lambda: ed.decompose(model, TOKENS), lambda: ed.per_sample_hessian(model, TOKENS, ed.SquaredError())):
        with pytest.raises(ValueError, match=f"set {option}=False"):
            asked()
    d = ed.decompose(model, TOKENS, parameters=["out.*"], n_directions=2, steps=2, batch_size=4, progress=False)
    assert d.encode(TOKENS).shape == (5, 2)  # a table that is not chosen may be looked up as it likes
