"""The paper's statements about gradients, curvature and codes, each tried on random numbers."""

import math

import pytest
import torch
from torch import Tensor

import eigendecomp as ed
from eigendecomp import curvature
from eigendecomp.reference import Draws
from eigendecomp.target import Target


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def softmax_hessian(p: Tensor) -> Tensor:
    return p.diag() - p.outer(p)


def every_draw(p: Tensor, jacobian: Tensor) -> Tensor:
    """Jᵀ(p − e_y), one row a class."""
    return (p - torch.eye(len(p), dtype=p.dtype)) @ jacobian


def random_prediction(classes: int) -> Tensor:
    return torch.randn(classes, dtype=torch.double).softmax(0)


def nuclear(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, "nuc").item()


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 5)).double()


def test_one_coefficient_a_draw_rebuilds_three_equal_classes_though_the_hessian_has_rank_two() -> None:
    p = torch.full((3,), 1 / 3, dtype=torch.double)
    jacobian = torch.randn(3, 7, dtype=torch.double)
    g = every_draw(p, jacobian)
    rows = torch.nn.functional.normalize(g, dim=1)
    z = g @ rows.T
    largest = z.abs().argmax(1)
    rebuilt = z.gather(1, largest[:, None]) * rows[largest]
    torch.testing.assert_close(rebuilt, g)
    h = jacobian.T @ softmax_hessian(p) @ jacobian
    torch.testing.assert_close(g.T @ g / 3, h)
    assert torch.linalg.matrix_rank(h) == 2


def test_no_direction_holds_more_than_half_of_three_equal_classes() -> None:
    p = torch.full((3,), 1 / 3, dtype=torch.double)
    transposed = torch.linalg.qr(torch.randn(7, 3, dtype=torch.double)).Q  # Jᵀ, an isometry
    values = torch.linalg.eigvalsh(transposed @ softmax_hessian(p) @ transposed.T)
    assert values[-1] / values.sum() == pytest.approx(0.5)


@pytest.mark.parametrize("size", [0.1, 0.4, 1.0])
def test_the_bound_for_any_code_holds_and_is_attained(size: float) -> None:
    g = torch.randn(50, 6, dtype=torch.double)
    h, total = g.T @ g / 50, g.square().sum() / 50
    for rebuilt in (g + size * torch.randn_like(g), g * (torch.rand_like(g) > size / 2), (1 + size) * g):
        epsilon = ((g - rebuilt).square().sum() / 50 / total).item()
        distance = nuclear(h - rebuilt.T @ rebuilt / 50)
        assert distance <= (2 * math.sqrt(epsilon) + epsilon) * total * (1 + 1e-12)
    assert distance == pytest.approx((2 * math.sqrt(epsilon) + epsilon) * total.item())  # the last of the three


def test_the_bound_for_any_code_holds_for_sums_over_samples() -> None:
    total, left, distance = 0.0, 0.0, 0.0
    for scale in (0.1, 1.0, 3.0):
        g = scale * torch.randn(50, 6, dtype=torch.double)
        rebuilt = g * torch.rand(50, 1, dtype=torch.double).sqrt()
        total, left = total + g.square().sum().item() / 50, left + (g - rebuilt).square().sum().item() / 50
        distance += nuclear((g.T @ g - rebuilt.T @ rebuilt) / 50)
    assert distance <= 2 * math.sqrt(left * total) + left


def test_the_bound_is_empty_from_three_less_two_roots_of_two() -> None:
    edge = (math.sqrt(2) - 1) ** 2
    assert 2 * math.sqrt(edge) + edge == pytest.approx(1)
    assert edge == pytest.approx(3 - 2 * math.sqrt(2)) == pytest.approx(0.1716, abs=1e-4)


def test_with_one_support_for_all_draws_the_identity_holds_and_the_rank_is_that_of_the_support() -> None:
    p, jacobian = random_prediction(5), torch.randn(5, 9, dtype=torch.double)
    g, h = every_draw(p, jacobian), jacobian.T @ softmax_hessian(p) @ jacobian
    readers, writers = torch.randn(2, 4, 9, dtype=torch.double)
    strength = torch.einsum("vw,wx,vx->v", readers, h, readers)
    torch.testing.assert_close(p @ (g @ readers.T).square(), strength)  # E[z²] = uᵀHu
    kept = strength.topk(2).indices
    a = writers[kept].T @ readers[kept]
    left = (p * (g - g @ a.T).square().sum(1)).sum()
    rest = torch.eye(9, dtype=torch.double) - a
    torch.testing.assert_close(left, (rest @ h @ rest.T).trace())
    assert torch.linalg.matrix_rank(a @ h @ a.T) == 2


@pytest.mark.parametrize("draws", [1, 3, 10])
def test_what_draws_leave_is_below_the_bound_for_a_vocabulary(draws: int) -> None:
    p, jacobian = random_prediction(30), torch.randn(30, 40, dtype=torch.double)
    g, h = every_draw(p, jacobian), jacobian.T @ softmax_hessian(p) @ jacobian
    bound = (p * (1 - p) ** draws * g.square().sum(1)).sum()
    left = []
    for _ in range(300):
        seen = g[p.multinomial(draws, replacement=True)]
        basis = torch.linalg.svd(seen, full_matrices=False)
        span = basis.Vh[basis.S[0] * 1e-9 < basis.S]
        left.append(h.trace() - torch.einsum("iw,wx,ix->", span, h, span))
    assert torch.stack(left).mean() <= bound <= h.trace()


def test_an_autoencoder_of_inputs_is_a_dictionary_with_free_writers() -> None:
    asked, x, rebuilt = (torch.randn(n, dtype=torch.double) for n in (3, 5, 5))
    left = (asked.outer(x) - asked.outer(rebuilt)).square().sum()
    torch.testing.assert_close(left, asked.square().sum() * (x - rebuilt).square().sum())


@pytest.mark.parametrize("divergence", [ed.KLDivergence(), ed.SquaredError()])
def test_the_mean_reference_is_the_drawn_one_without_noise(divergence: ed.KLDivergence | ed.SquaredError) -> None:
    f, others = torch.randn(1, 1, 5, dtype=torch.double), torch.randn(200, 5, dtype=torch.double)
    draw = torch.Generator().manual_seed(0)
    predictions = divergence.predict(others)
    against_mean = Draws.of(ed.Mean(), divergence, ed.Mean().prepare(divergence, predictions, draw), (1, 1), 1, draw)
    each = torch.stack([divergence.cotangent(f[0, 0], q) for q in predictions])
    torch.testing.assert_close(each.mean(0), against_mean(f)[0, 0, 0])
    anything = torch.randn(5, dtype=torch.double)  # a code of the sample alone
    spread = (each - each.mean(0)).square().sum(1).mean()
    left = (each - anything).square().sum(1).mean()
    torch.testing.assert_close(left, (each.mean(0) - anything).square().sum() + spread)


def test_activation_is_the_root_of_two_times_the_move_under_squared_error_and_the_fisher_length_under_kl() -> None:
    model, x = small_model(), torch.randn(2, 3, dtype=torch.double)
    jacobian = curvature.jacobian(Target(model), (x,))
    u = torch.nn.functional.normalize(torch.randn(jacobian.shape[-1], dtype=torch.double), dim=0)
    move = jacobian @ u
    square = ed.per_sample_hessian(model, x, ed.SquaredError())
    torch.testing.assert_close((u @ square @ u).sqrt(), math.sqrt(2) * move.norm(dim=1))
    p = model(x).detach().softmax(1)
    fisher = (p * move.square()).sum(1) - (p * move).sum(1).square()
    torch.testing.assert_close(u @ ed.per_sample_hessian(model, x, ed.KLDivergence()) @ u, fisher)


def test_one_gradient_is_enough_for_one_output_and_where_the_jacobian_has_rank_one() -> None:
    for jacobian in (torch.randn(1, 4), torch.randn(3, 1) @ torch.randn(1, 4)):
        j = jacobian.double()
        h, g = 2 * j.T @ j, j.T @ torch.randn(len(j), dtype=torch.double)
        projector = g.outer(g) / g.square().sum()
        torch.testing.assert_close(projector @ h @ projector, h)
