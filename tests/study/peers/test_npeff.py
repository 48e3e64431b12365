"""Rank-one NPEFF: the loss is its formula, updates lower it, and planted components come back."""

import torch

from eigendecomp.study.peers import npeff


def test_the_loss_is_that_of_the_matrices() -> None:
    torch.manual_seed(0)
    root, rows, w = torch.randn(5, 3, 7), torch.randn(4, 7), torch.rand(5, 4)
    matrices = root.mT @ root
    model = torch.einsum("nc,ci,cj->nij", w, rows, rows)
    direct = ((matrices - model).square().sum() - matrices.square().sum()) / 5
    torch.testing.assert_close(npeff.loss(root, rows, w), direct)


def test_scaled_matrices_have_unit_norm_and_flat_samples_are_left_out() -> None:
    torch.manual_seed(0)
    root = torch.randn(4, 2, 6)
    root[2] = 0
    made = npeff.scaled(root)
    torch.testing.assert_close((made.mT @ made).norm(dim=(1, 2)), torch.ones(3))


def test_an_update_of_the_coefficients_lowers_the_loss_and_keeps_them_positive() -> None:
    torch.manual_seed(0)
    root, rows, w = torch.randn(9, 3, 7), torch.randn(4, 7), torch.rand(9, 4)
    values = []
    for _ in range(5):
        values.append(npeff.loss(root, rows, w).item())
        w = npeff.updated(w, *npeff.terms(root, rows))
    assert values == sorted(values, reverse=True) and (w >= 0).all()


def test_planted_components_are_found() -> None:
    torch.manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    strength = torch.rand(200, 3) * (torch.rand(200, 3) < 0.5)
    root = strength.sqrt().unsqueeze(-1) * truth
    found = npeff.fit(root, 3, seed=0, steps=400)
    assert (found.rows @ truth.T).abs().amax(0).min() > 0.99
    assert found.error < 0.01
