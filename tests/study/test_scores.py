"""Encoder rows at unit norm keep the coefficients that were kept."""

import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.study import scores

pytestmark = pytest.mark.usefixtures("in_float64")


@pytest.mark.parametrize("sparsity", [ed.BatchTopK(0.2), ed.L1(0.1)])
def test_encoder_rows_at_unit_norm_keep_as_many_coefficients(sparsity) -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval(), torch.randn(200, 5)
    d = ed.decompose(
        model, x, divergence=ed.KLDivergence(), reference=ed.ModelSample(), n_directions=8, rank=1, tied=False,
        steps=100, batch_size=32, sparsity=sparsity, progress=False,
    )  # fmt: skip
    rows = scores.encoder_rows(d)
    norms = d.encoder.norms()
    assert norms.max() > 1.05 * norms.min()  # so that one threshold would not do for all
    before, after = d.encode(x, sparse=True), rows.encode(x, sparse=True)
    # The threshold is itself a coefficient of the data, which rounding may put on either side.
    clear = (d.encode(x).abs() - (d.threshold or 0)).abs() > 1e-9
    assert clear.sum() >= clear.numel() - 1
    assert torch.equal((before != 0)[clear], (after != 0)[clear])
    torch.testing.assert_close((after * norms)[clear], before[clear])
    torch.testing.assert_close(rows.decoder.norms(), torch.ones(8))
