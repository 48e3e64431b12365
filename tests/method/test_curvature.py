"""Per-sample Hessians and curvature along directions: closed forms, autograd and dense algebra against each other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import eigendecomp as ed
from eigendecomp.curvature import curvatures, hessian_root, jacobian, push_forward
from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence
from eigendecomp.gradients import FunctionalSource
from eigendecomp.reference import Draws
from eigendecomp.target import Target
from rooms.curvature.criteria import explained_share, orthonormal, rebuilt_hessians, strongest_share

DIVERGENCES: list[Divergence] = [ed.SquaredError(), ed.KLDivergence()]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model(nn.Module):
    """Parts and a function of them, with random parameters in float64."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        for i, (name, part) in enumerate(parts.items()):
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(normal(*part, seed=i)))
        self.function = forward
        self.double().eval()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(normal(*p.shape, seed=100 + i))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def mlp(inputs: int = 2, hidden: int = 3, outputs: int = 3) -> Model:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ m.w + m.b) @ m.v * m.scale

    return Model(forward, w=(inputs, hidden), b=(hidden,), v=(hidden, outputs), scale=())


def some_directions(target: Target, n: int = 4, rank: int = 1) -> Directions:
    g = torch.Generator().manual_seed(3)
    return Directions.random(target.shapes, n, rank, generator=g, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Dense Hessians


@every_divergence
@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 4), st.integers(0, 2), st.integers(0, 99))
def test_closed_form_and_autograd_agree(
    divergence: Divergence, inputs: int, hidden: int, outputs: int, positions: int, seed: int
) -> None:
    model = mlp(inputs, hidden, outputs)
    x = normal(3, *[positions] * (positions > 0), inputs, seed=seed)
    closed, autograd = (per_sample(model, x, divergence, method) for method in ("closed", "autograd"))
    assert closed.shape == (3 * max(1, positions), *[sum(p.numel() for p in model.parameters())] * 2)
    assert (closed - autograd).norm() <= 1e-10 * autograd.norm()


def per_sample(model: nn.Module, x: Tensor, divergence: Divergence, method: str) -> Tensor:
    return ed.per_sample_hessian(model, x, divergence, method=method)


@every_divergence
def test_the_hessian_is_that_of_finite_differences(divergence: Divergence) -> None:
    """Of D(f(x, w), f(x, w₀)), by central differences of its gradient."""
    model, x = mlp(1, 2, 2), normal(2, 1)
    target = Target(model)
    w0 = torch.cat([p.flatten() for p in target.chosen.values()]).detach()
    sizes = [p.numel() for p in target.chosen.values()]
    r = divergence.predict(target.outputs((x,)))

    def gradient(w: Tensor) -> Tensor:
        parts = {name: v.view_as(p) for (name, p), v in zip(target.chosen.items(), w.split(sizes), strict=True)}
        values = divergence.value(target.call((x,), parts), r)
        return torch.stack([torch.autograd.grad(v, w, retain_graph=True)[0] for v in values.flatten()])

    columns = []
    for i in range(len(w0)):
        step = torch.zeros_like(w0)
        step[i] = 1e-5
        ends = [gradient((w0 + sign * step).requires_grad_()) for sign in (1, -1)]
        columns.append((ends[0] - ends[1]) / 2e-5)
    expected = torch.stack(columns, -1)
    for method in ("closed", "autograd"):
        torch.testing.assert_close(per_sample(model, x, divergence, method), expected, rtol=1e-6, atol=1e-8)


@every_divergence
def test_chosen_parameters_have_their_block(divergence: Divergence) -> None:
    model, x = mlp(), normal(4, 2)
    whole = ed.per_sample_hessian(model, x, divergence)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    start = sizes["w"]
    block = slice(start, start + sizes["b"])
    part = ed.per_sample_hessian(model, x, divergence, parameters=["b"])
    torch.testing.assert_close(part, whole[:, block, block])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, x: ed.per_sample_hessian(m, x, ed.SquaredError(), method="exact"), "'exact' must be 'closed' or"),
        (lambda m, x: ed.per_sample_hessian(m, x, ed.OutputSum(), method="autograd"), "OutputSum"),
        (lambda m, x: ed.per_sample_hessian(m, x, ed.SquaredError(), parameters=["q"]), "'q' matches none"),
        (lambda m, x: ed.per_sample_hessian(m, x[:0], ed.SquaredError()), "zero examples"),
        (lambda m, x: ed.per_sample_hessian(nn.Linear(2, 5000), x.float(), ed.SquaredError()), "15000 parameters"),
    ],
)
def test_what_has_no_dense_hessian_is_refused(call: Callable[[nn.Module, Tensor], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(mlp(), normal(3, 2))


def test_the_output_sum_has_the_curvature_of_the_squared_error() -> None:
    model, x = mlp(), normal(3, 2)
    ours, theirs = (ed.per_sample_hessian(model, x, d) for d in (ed.OutputSum(), ed.SquaredError()))
    assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# The second moment of gradients against model samples


@every_divergence
def test_gradients_against_model_samples_have_the_hessian_as_second_moment(divergence: Divergence) -> None:
    """And their error falls as 1/√n: sixteen times the draws, a quarter of the error, as an average over samples."""
    model, x = mlp(), normal(12, 2)
    target = Target(model)
    hessian = ed.per_sample_hessian(model, x, divergence)
    size = hessian.flatten(1).norm(dim=1)
    errors = []
    for draws in (64, 1024):
        cotangents = Draws.of(
            ed.ModelSample(), divergence, x.new_zeros(0, 3), (12, 1), draws, torch.Generator().manual_seed(0)
        )
        g = FunctionalSource(target)((x,), cotangents).flat().view(12, draws, -1)
        moment = g.mT @ g / draws
        errors.append(((moment - hessian).flatten(1).norm(dim=1) / size).mean())
    assert errors[1] < 0.15
    assert 2.5 < errors[0] / errors[1] < 6.4  # 4, give or take the spread of twelve samples' mean


# ---------------------------------------------------------------------------------------------------------------------
# Along directions


@every_divergence
@pytest.mark.parametrize("rank", [1, 2])
def test_activation_squared_is_the_quadratic_form(divergence: Divergence, rank: int) -> None:
    model, x = mlp(), normal(5, 3, 2)
    d = ed.decompose(model, x, divergence=divergence, n_directions=4, rank=rank, steps=3, progress=False, batch_size=8)
    u = torch.cat([part.flatten(1) for part in d.directions().values()], 1)
    h = ed.per_sample_hessian(model, x, divergence)
    expected = torch.einsum("vi,nij,vj->nv", u, h, u)
    found = d.activation(x).square()
    assert found.shape == (15, 4)
    assert (found - expected).abs().max() <= 1e-10 * expected.max()


@every_divergence
def test_no_budget_and_no_batch_changes_what_is_pushed_forward(
    divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = mlp(), normal(7, 2)
    target = Target(model)
    directions = some_directions(target)
    moved = push_forward(target, divergence, directions, (x,))
    root, u = hessian_root(model, x, divergence), directions.flat()
    torch.testing.assert_close(moved, torch.einsum("nkw,vw->nvk", root, u), rtol=1e-10, atol=1e-12)
    with monkeypatch.context() as small:
        small.setattr("eigendecomp.curvature.BUDGET", 1)
        torch.testing.assert_close(push_forward(target, divergence, directions, (x,)), moved)
    parts = [push_forward(target, divergence, directions, (x[i : i + 3],)) for i in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts), moved)
    torch.testing.assert_close(curvatures(target, divergence, directions, (x,)), moved.square().sum(-1))


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (x @ w for w in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0] @ m.o


def recurrent(kind: type[nn.Module]) -> tuple[Model, Tensor]:
    net = kind(2, 3, batch_first=True)  # type: ignore[call-arg]
    return Model(lambda m, x: m.net(x)[0][..., :2], net=net), normal(3, 4, 2)


def unrolled(m: Any, x: Tensor) -> Tensor:
    state = None
    for step in x.unbind(1):
        state = m.cell(step, state)
    assert state is not None
    return state[0][:, :2]


MODELS: dict[str, Callable[[], tuple[Model, Tensor]]] = {
    "convolution": lambda: (
        Model(
            lambda m, x: m.norm(m.conv(x)).relu_().flatten(1)[:, :3],
            conv=nn.Conv2d(1, 2, 2), norm=nn.BatchNorm2d(2),
        ),
        normal(3, 1, 3, 3),
    ),
    "attention": lambda: (Model(attention, q=(2, 2), k=(2, 2), v=(2, 2), o=(2, 3)), normal(3, 4, 2)),
    "multihead": lambda: (
        Model(lambda m, x: m.net(x, x, x)[0][..., :3], net=nn.MultiheadAttention(4, 2, batch_first=True)),
        normal(3, 2, 4),
    ),
    "embedding": lambda: (
        Model(
            lambda m, x: m.norm(m.table(x)) @ m.table.weight.T, table=nn.Embedding(4, 3), norm=nn.LayerNorm(3)
        ),
        torch.tensor([[0, 1], [3, 3], [2, 0]]),
    ),
    "lstm": lambda: recurrent(nn.LSTM),
    "gru": lambda: recurrent(nn.GRU),
    "lstm cell": lambda: (Model(unrolled, cell=nn.LSTMCell(2, 3)), normal(3, 2, 2)),
    "group norm": lambda: (
        Model(lambda m, x: m.norm(x[..., None] * m.s)[..., 0], s=(1,), norm=nn.GroupNorm(2, 4)), normal(3, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_every_kind_of_model_is_pushed_forward(make: Callable[[], tuple[Model, Tensor]]) -> None:
    """S^½ J u against the output's movement itself, by central differences."""
    model, x = make()
    target = Target(model)
    directions = some_directions(target, 2)
    moved = push_forward(target, ed.SquaredError(), directions, (x,))
    with torch.no_grad():
        for v in range(2):
            ends = []
            for step in (1e-5, -1e-5):
                values = {name: p + step * directions.dense(name)[v].view(p.shape) for name, p in target.chosen.items()}
                ends.append(target.call((x,), values).flatten(0, 1))
            expected = 2**0.5 * (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(moved[:, v], expected, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_what_directions_rebuild_is_what_the_dense_projector_leaves() -> None:
    root, u = normal(5, 2, 9), normal(4, 9, seed=1)
    h = root.mT @ root
    p = torch.linalg.pinv(u) @ u
    inside = p @ h @ p
    found = rebuilt_hessians(root, u)
    trace = lambda m: m.diagonal(dim1=1, dim2=2).sum()  # noqa: E731
    assert found.trace == pytest.approx((trace(inside) / trace(h)).item())
    assert found.error == pytest.approx(((h - inside).norm() / h.norm()).item())
    plain = u.T @ u
    assert found.plain_error == pytest.approx(((h - plain @ h @ plain).norm() / h.norm()).item())
    shares = (p @ h @ p).diagonal(dim1=1, dim2=2).sum(1) / h.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(explained_share(root, u), shares)


def test_a_basis_spans_the_rows_and_no_more() -> None:
    rows = normal(3, 6)
    rows = torch.cat([rows, rows[:1] + rows[1:2]])  # four rows, three dimensions
    basis = orthonormal(rows)
    torch.testing.assert_close(basis.T @ basis, torch.linalg.pinv(rows) @ rows)
    assert not orthonormal(torch.zeros(2, 3)).any()


def test_the_strongest_directions_of_each_sample_count() -> None:
    """Samples that curve along one axis each, and directions that are the axes: one suffices."""
    one = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[:, None]
    assert strongest_share(one, torch.eye(3)) == pytest.approx(1.0)
    both = torch.cat([torch.eye(3)[:, None], torch.eye(3).roll(1, 0)[:, None]], 1)  # each curves along two axes
    assert strongest_share(both, torch.eye(3)) == pytest.approx(0.5)
    assert strongest_share(both, torch.eye(3), k=2) == pytest.approx(1.0)


def test_nothing_to_rebuild_is_refused() -> None:
    with pytest.raises(ValueError, match="Hessian is zero"):
        rebuilt_hessians(torch.zeros(3, 2, 4), torch.eye(4))


@every_divergence
def test_interactions_are_the_normalised_mean_cross_curvature(divergence: Divergence) -> None:
    model, x = mlp(), normal(9, 2)
    d = ed.decompose(model, x, divergence=divergence, n_directions=3, steps=3, progress=False)
    u = torch.cat([part.flatten(1) for part in d.directions().values()], 1)
    mean = (u @ ed.per_sample_hessian(model, x, divergence) @ u.T).mean(0)
    expected = mean / mean.diagonal().sqrt().outer(mean.diagonal().sqrt())
    found = ed.interactions(d, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))


def test_a_direction_that_moves_nothing_interacts_with_nothing() -> None:
    model = Model(lambda m, x: x @ m.w, w=(2, 2), unused=(2,))
    d = ed.decompose(model, normal(6, 2), n_directions=2, steps=2, progress=False)
    for factors in (d.decoder.factors["w"], d.encoder.factors["w"]):
        for factor in factors:
            factor[0] = 0
    found = ed.interactions(d, normal(6, 2))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert not d.activation(normal(6, 2))[:, 0].any()


# ---------------------------------------------------------------------------------------------------------------------
# Backwards


def one_by_one(target: Target, x: Tensor) -> Tensor:
    """J of every sample by torch.autograd.grad, one example and output at a time."""
    parameters = dict(target.model.named_parameters())
    chosen, rows = [parameters[name] for name in target.names], []
    for example in x:
        f = target.model(example.unsqueeze(0))
        for row in f.view(-1, f.shape[-1]):
            grads = [torch.autograd.grad(y, chosen, retain_graph=True, materialize_grads=True) for y in row]
            rows.append(torch.stack([torch.cat([g.flatten() for g in some]) for some in grads]))
    return torch.stack(rows)


@every_divergence
@pytest.mark.parametrize("positions", [0, 2])
def test_backwards_through_a_source_is_the_same(divergence: Divergence, positions: int) -> None:
    model, x = mlp(), normal(6, *[positions] * (positions > 0), 2)
    target = Target(model)
    source, directions = FunctionalSource(target), some_directions(target, 8)
    moved = push_forward(target, divergence, directions, (x,))
    torch.testing.assert_close(push_forward(target, divergence, directions, (x,), source=source), moved)
    squares = curvatures(target, divergence, directions, (x,), source=source)
    torch.testing.assert_close(squares, moved.square().sum(-1))


class NoForward(torch.autograd.Function):
    """tanh, without a forward derivative and without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0] * (1 - ctx.saved_tensors[0].square())


BACKWARD_ONLY = {
    "function": (Model(lambda m, x: NoForward.apply(x @ m.w) @ m.v, w=(3, 4), v=(4, 2)), normal(5, 3)),
    "lstm": (Model(lambda m, x: m.l(x)[0][:, -1], l=nn.LSTM(3, 2, batch_first=True)), normal(5, 4, 3)),
    "weight norm": (
        Model(lambda m, x: m.l(x), l=nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))), normal(5, 3)
    ),
    "cdist": (Model(lambda m, x: torch.cdist(x, m.w), w=(4, 3)), normal(5, 1, 3)),
}  # fmt: skip


@every_divergence
@pytest.mark.parametrize("name", BACKWARD_ONLY)
def test_layers_without_a_forward_derivative_are_taken_backwards(name: str, divergence: Divergence) -> None:
    model, x = BACKWARD_ONLY[name]
    target = Target(model)
    directions = some_directions(target)
    j = one_by_one(target, x)
    f = target.outputs((x,)).flatten(0, 1)
    root = divergence.root(f.unsqueeze(1), j.mT).mT
    expected = (root @ directions.flat(target.names).T).mT
    torch.testing.assert_close(push_forward(target, divergence, directions, (x,)), expected, rtol=1e-10, atol=1e-10)
    squares = curvatures(target, divergence, directions, (x,))
    torch.testing.assert_close(squares, expected.square().sum(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(jacobian(target, (x,)), j, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(per_sample(model, x, divergence, "closed"), root.mT @ root, rtol=1e-10, atol=1e-10)
