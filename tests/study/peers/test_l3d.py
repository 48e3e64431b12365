"""L3D as published: its two gradients, its references, and the pentagon's features in a few seconds."""

import torch

from eigendecomp.curvature import jacobian
from eigendecomp.study.peers import l3d
from eigendecomp.target import Target
from eigendecomp.targets.toys import tms


def pentagon() -> tms.TMS:
    angle = 2 * torch.pi * torch.arange(5) / 5
    model = tms.TMS(5, 2, tied=False)
    with torch.no_grad():
        model.W_in.copy_(1.2 * torch.stack([angle.cos(), angle.sin()], 1))
        assert model.W_out is not None
        model.W_out.copy_(model.W_in.T)
        model.b.fill_(-0.35)
    return model


def test_cotangents_of_the_paper_and_of_its_code() -> None:
    f, r = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(l3d.cotangents(f, r), 2 * (f - r))
    torch.testing.assert_close(l3d.cotangents(f, r, "code"), 2 * f - r)


def test_references() -> None:
    f, draw = torch.randn(6, 3), torch.Generator().manual_seed(0)
    assert (l3d.references(f, "zero", draw) == 0).all()
    torch.testing.assert_close(l3d.references(f, "mean", draw)[2], f.mean(0))
    other = l3d.references(f, "other", draw)
    assert all(any(torch.equal(row, each) for each in f) for row in other)


def test_the_features_of_a_pentagon() -> None:
    model, draw = pentagon(), torch.Generator().manual_seed(0)
    x = tms.data(600, 5, draw, none_empty=True)
    chosen = Target(model, ["W_*"])
    j = jacobian(chosen, (x,))
    with torch.no_grad():
        f = model(x)
    found = l3d.fit(j, f, chosen.shapes, l3d.Settings(5, epochs=60, decay_epochs=10, kept=0.25), seed=1)
    torch.testing.assert_close(found.decoder.norms(), torch.ones(5))
    assert 0 < found.error < 0.6
    cosines = torch.cosine_similarity(found.decoder.dense("W_in").detach(), model.W_in.detach(), dim=-1)
    assert cosines.amax(0).mean() > 0.95
