"""Patches of the Fashion-MNIST network: the same network, parts that are where they should be, floors that fit."""

import pytest
import torch

from eigendecomp.targets.fashion import images, network
from rooms.fashion import block, patches


@pytest.fixture(scope="module")
def tail() -> block.FromMiddle:
    return block.FromMiddle(network.untrained((4, 6, 8), seed=0).eval())


def test_the_unfolded_network_is_the_same(tail: block.FromMiddle) -> None:
    x = torch.randn(3, 6, 14, 14)
    other = patches.unfolded(tail)
    torch.testing.assert_close(other(x), tail(x), rtol=1e-4, atol=1e-5)
    assert dict(other.named_parameters())["block2.conv1.matrix.weight"].shape == (6, 54)
    assert isinstance(tail.block2.conv1, torch.nn.Conv2d)


def test_a_decision_is_added_up_from_patches(tail: block.FromMiddle) -> None:
    x = torch.randn(3, 6, 14, 14).relu()
    model = patches.unfolded(tail)
    added, gradient = patches.decision(model, x, 2, 5)
    weight = model.get_parameter("block2.conv1.matrix.weight")
    f = model(x)
    (expected,) = torch.autograd.grad((f[:, 2] - f[:, 5]).mean(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert added.shape == (3, 196)


def test_parts_lie_in_their_places() -> None:
    x = torch.zeros(2, 1, 28, 28)
    x[0, 0, 10:20, 2:26] = 0.5  # a shoe
    x[1, 0, 2:26, 6:12] = x[1, 0, 2:26, 16:22] = 0.5  # trousers without a waist
    x[1, 0, 2:6, 6:22] = 0.5
    found = patches.parts(x, torch.tensor([images.SNEAKER, images.TROUSER]))
    place = {name: held.view(2, 14, 14) for name, held in found.items()}
    assert place["sole"][0].nonzero()[:, 0].unique().tolist() == [9]
    assert place["toe"][0].nonzero()[:, 1].max() < 4
    assert place["heel"][0].nonzero()[:, 1].min() > 10
    assert not place["sole"][1].any()
    gap = place["gap between legs"][1].nonzero()
    assert gap[:, 1].unique().tolist() == [6, 7]
    assert gap[:, 0].min() > 3
    assert place["top outline"][0].nonzero()[:, 0].unique().tolist() == [5]
    assert place["left outline"][1].nonzero()[:, 1].unique().tolist() == [3, 8]
    assert place["plain"].any()
    with pytest.raises(ValueError, match="one label"):
        patches.parts(x, torch.tensor([1]))


def test_means_find_clusters() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(12, 3, generator=draw)).Q.T
    at = torch.randint(3, (300,), generator=draw)
    x = centres[at] * (1 + torch.rand(300, 1, generator=draw)) + 0.02 * torch.randn(300, 12, generator=draw)
    found, nearest = patches.input_means(x, 12, seed=1)
    assert found.shape == (12, 12)
    assert (centres @ found.T).amax(1).min() > 0.99
    assert all(len(at[nearest == c].unique()) <= 1 for c in range(12))
    writers = torch.linalg.qr(torch.randn(5, 3, generator=draw)).Q.T
    sign = 2.0 * torch.randint(2, (300, 1), generator=draw) - 1
    a, b = patches.gradient_means(x, sign * writers[at], 12, seed=1)
    along = (centres @ a.T) * (writers @ b.T)
    assert along.abs().amax(1).min() > 0.99


def test_rows_rebuild_what_they_span() -> None:
    rows = torch.nn.functional.normalize(torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), dim=1)
    g = torch.stack([rows[1], 2 * rows[0] - 3 * rows[4]])
    held = patches.rebuilt(g, rows, (1, 3))
    assert held[1][0] == pytest.approx(1, abs=1e-6)
    assert held[1][1] < 1
    assert held[3].tolist() == pytest.approx([1, 1], abs=1e-5)
