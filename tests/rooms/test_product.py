"""Pairs of features that share an output, with a product or without."""

import torch

from rooms.interventions import product

PAIRS, SUMS = ((0, 1),), ((2, 3),)


def test_outputs_are_what_they_say() -> None:
    x, y = product.data(200, 5, PAIRS, torch.Generator().manual_seed(0), active=0.6, sums=SUMS)
    torch.testing.assert_close(y[:, 0], x[:, 0] + x[:, 1] + 2 * x[:, 0] * x[:, 1])
    torch.testing.assert_close(y[:, 1], x[:, 2] + x[:, 3])
    torch.testing.assert_close(y[:, 2], x[:, 4])
    assert y.shape == (200, 3)


def test_a_trained_network_has_the_wiring_of_sums_as_of_pairs() -> None:
    model, _ = product.train(5, 3, PAIRS, seed=0, steps=2, sums=SUMS)
    reads = (model.hidden.weight != 0).float()
    assert sorted(reads.sum(1).tolist()) == [1.0] * 3 + [2.0] * 6
    assert model.out.weight.shape == (3, 9)
