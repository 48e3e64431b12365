"""Clusters that are planted are found, in inputs and in outer products; how much of a vector some rows hold."""

import pytest
import torch
from torch.nn.functional import normalize

from eigendecomp.study import clusters

pytestmark = pytest.mark.usefixtures("in_float64")


def planted(count: int, d: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(count, d, generator=generator), dim=1)
    which = torch.randint(count, (n,), generator=generator) ** 2 // count  # clusters of very different sizes
    return centres, which


def test_clusters_of_inputs_of_any_size_and_length_are_found() -> None:
    centres, which = planted(12, 20, 600, 0)
    noise, length = 0.02 * torch.randn(600, 20), torch.rand(600, 1) + 0.5
    found, nearest = clusters.inputs((centres[which] + noise) * length, len(which.unique()), seed=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    assert ((found @ centres[which.unique()].T).amax(0) > 0.99).all()
    assert len({(int(a), int(b)) for a, b in zip(which, nearest, strict=True)}) == len(found)


def test_a_centre_without_rows_finds_some() -> None:
    x = torch.eye(4).repeat(5, 1)
    found, nearest = clusters.inputs(x, 4, seed=1, restarts=1)
    assert len(nearest.unique()) == 4
    torch.testing.assert_close(found.sort(0).values[-1], torch.ones(4))


@pytest.mark.parametrize("by_input", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_clusters_of_gradients_are_found(signed: bool, by_input: bool) -> None:
    readers, which = planted(6, 10, 400, 2)
    writers, _ = planted(6, 8, 400, 3)
    sign = 1 if signed else 2 * torch.randint(2, (400, 1)) - 1
    x, asked = readers[which] + 0.02 * torch.randn(400, 10), sign * (writers[which] + 0.02 * torch.randn(400, 8))
    present = which.unique()
    a, b = clusters.gradients(x, asked, len(present), seed=0, signed=signed, by_input=by_input)
    alike = (a @ readers[present].T) * (b @ writers[present].T)
    assert ((alike if signed else alike.abs()).amax(0) > 0.98).all()


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="count=3"):
        clusters.inputs(torch.ones(2, 2), 3, seed=0)
    with pytest.raises(ValueError, match="count=0"):
        clusters.gradients(torch.ones(2, 2), torch.ones(2, 2), 0, seed=0)


def test_a_share_is_that_of_least_squares_and_grows() -> None:
    g, rows = torch.randn(5, 12), normalize(torch.randn(7, 12), dim=1)
    found = clusters.rebuilt(g, rows, (1, 3, 7, 20))
    best = (g @ rows.T).square().amax(1) / g.square().sum(1)
    torch.testing.assert_close(found[1], best)
    fitted = torch.linalg.lstsq(rows.T, g.T).solution
    torch.testing.assert_close(found[7], (rows.T @ fitted).square().sum(0) / g.square().sum(1), rtol=1e-5, atol=1e-6)
    assert (found[1] <= found[3]).all() and (found[3] <= found[7]).all()
    torch.testing.assert_close(found[20], found[7])
