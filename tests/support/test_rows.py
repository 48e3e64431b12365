"""Outputs that are computed a few at a time: the same rows and the same pool as of all at once."""

import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.reference import Reference
from eigendecomp.support import rows
from eigendecomp.support.rows import Outputs
from eigendecomp.target import Target


def softmax(f: torch.Tensor) -> torch.Tensor:
    return f.softmax(-1)


@pytest.mark.parametrize("reference", [ed.OtherSample(7), ed.Mean(), ed.Uniform(), ed.Constant([0.25] * 4)])
def test_pools_of_pieces_are_those_of_everything(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    target, x = Target(nn.Linear(3, 4).double()), torch.randn(30, 5, 3, dtype=torch.float64)
    pools = []
    for held in (1 << 24, 0):
        monkeypatch.setattr(rows, "HELD", held)
        monkeypatch.setattr(rows, "PIECE", 70)
        outputs = Outputs.of(target, (x,))
        assert len(list(outputs.pieces())) == (1 if held else 10)
        generator = torch.Generator().manual_seed(3)
        pools.append(reference.prepare(ed.KLDivergence(), outputs.rows(softmax), generator))
    torch.testing.assert_close(*pools, rtol=1e-12, atol=0)


def test_rows_can_be_asked_for_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "HELD", 0)
    monkeypatch.setattr(rows, "PIECE", 8)
    target, x = Target(nn.Linear(3, 4)), torch.randn(9, 3)
    found, f = Outputs.of(target, (x,)).rows(softmax), softmax(target.outputs((x,)))[:, 0]
    for index in (torch.tensor([8, 0, 3, 3]), slice(0, 0), slice(2, 5)):
        torch.testing.assert_close(found[index], f[index])
