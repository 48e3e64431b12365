"""The interaction map against dense Hessians, and the functions that read it."""

import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.study import scores
from eigendecomp.targets.toys import manifold
from rooms.interventions import maps, product


@pytest.mark.parametrize("divergence", [ed.SquaredError(), ed.KLDivergence()])
def test_interactions_are_the_normalised_cross_curvature(divergence) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)).double(), torch.randn(70, 3).double()
    reference = ed.ModelSample()
    d = ed.decompose(model, x, divergence=divergence, reference=reference, n_directions=5, steps=5, progress=False)
    u, h = d.decoder.flat(), ed.per_sample_hessian(model, x, divergence).mean(0)
    cross = u @ h @ u.T
    expected = cross / cross.diagonal().sqrt().outer(cross.diagonal().sqrt())
    torch.testing.assert_close(ed.interactions(d, x), expected)


def test_blocks_and_order_find_planted_groups() -> None:
    matrix = torch.eye(6)
    for group in ([0, 3, 5], [1, 4]):
        for a in group:
            for b in group:
                if a != b:
                    matrix[a, b] = -0.6
    found = maps.blocks(matrix, 0.5)
    assert found[[0, 3, 5]].unique().numel() == 1
    assert found.unique().numel() == 3
    order = maps.clustered(matrix).tolist()
    places = sorted(order.index(v) for v in (0, 3, 5))
    assert places[2] - places[0] == 2
    assert sorted(order) == list(range(6))
    assert maps.clustered(torch.eye(2)).tolist() == [0, 1]


def test_together_counts_samples_that_use_both() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(50, 3)
    d = ed.decompose(model, x, n_directions=4, steps=20, sparsity=ed.BatchTopK(0.4), progress=False)
    on = d.encode(x, sparse=True) != 0
    both = (on[:, 0] & on[:, 1]).sum() / (on[:, 0] | on[:, 1]).sum().clamp_min(1)
    found = maps.together(d, x)
    assert found[0, 1] == pytest.approx(both.item())
    assert (found == found.T).all()
    assert ((found.diagonal() == 1) == on.any(0)).all()


def test_the_wiring_lets_only_pairs_meet() -> None:
    pairs = ((0, 1), (2, 3))
    reads, writes = product.wiring(5, 4, pairs, seed=0)
    assert reads.shape == (12, 5)
    assert writes.shape == (3, 12)
    meet = (reads.T @ reads > 0).fill_diagonal_(False)
    assert meet.nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    known = product.interacting(torch.tensor([1, 4, 0, 0]), pairs)
    assert known.nonzero().tolist() == [[0, 2], [0, 3], [2, 0], [3, 0]]


def test_product_outputs() -> None:
    x, y = product.data(100, 3, ((0, 2),), torch.Generator().manual_seed(0), active=0.6)
    assert x.any(1).all()
    torch.testing.assert_close(y, torch.stack([x[:, 0] + x[:, 2] + 2 * x[:, 0] * x[:, 2], x[:, 1]], 1))


def test_shares_and_counts_of_energy() -> None:
    energy = torch.tensor([[9.0, 1.0, 0.0], [1.0, 1.0, 2.0]])
    torch.testing.assert_close(scores.largest_share(energy), torch.tensor([0.9, 0.5, 1.0]))
    assert scores.fewest(energy, 0.85).tolist() == [1, 3]
    assert scores.fewest(energy, 0.75).tolist() == [1, 2]


def test_circles_are_doubled_and_lie_in_their_planes() -> None:
    planes = manifold.planes(3, 8, seed=0)
    torch.testing.assert_close(planes.flatten(0, 1) @ planes.flatten(0, 1).T, torch.eye(6), atol=1e-5, rtol=0)
    x, y = manifold.data(50, planes, torch.Generator().manual_seed(0), active=0.5, none_empty=True)
    point = torch.view_as_complex(torch.einsum("ni,cpi->ncp", x, planes).contiguous())
    wanted = torch.view_as_complex(y.unflatten(1, (3, 2)).contiguous())
    torch.testing.assert_close(point**2, wanted * point.abs(), atol=1e-5, rtol=0)
    assert (point.abs() > 0.1).any(1).all()
    image = manifold.same_length(torch.randn(4, 8), planes)
    lengths = torch.einsum("wi,cpi->cwp", image, planes).norm(dim=(1, 2))
    torch.testing.assert_close(lengths, torch.full((3,), 2**0.5))
