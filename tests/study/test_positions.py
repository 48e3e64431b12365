"""Gradients of uses, against ordinary backward passes; and directions planted in them."""

import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.study import positions
from tests.cases import Heads

KL, REFERENCE = ed.KLDivergence(), ed.ModelSample()


pytestmark = pytest.mark.usefixtures("in_float64")


def gather(model: nn.Module, x: torch.Tensor, parameters=("W_*",), seed: int = 0) -> positions.Uses:
    return positions.collect(model, x, divergence=KL, reference=REFERENCE, parameters=parameters, seed=seed)[0]


def test_the_uses_of_an_example_sum_to_its_gradient() -> None:
    model, x = Heads(), torch.randn(70, 6, 5)
    model.requires_grad_(True)
    found = gather(model, x)
    assert len(found) == 70 * 6 and found.positions == 6
    # The same references: one for every output, drawn in order.
    from eigendecomp.reference import Draws
    from eigendecomp.support.random import generator

    draw = generator(0, "references")
    parts = []
    for part in x.split(positions.CHUNK):
        f = model(part)
        c = Draws.of(REFERENCE, KL, f.new_zeros(0, 4), (len(part), 6), 1, draw)(f.detach())[:, :, 0]
        parts += [torch.autograd.grad(f[i], [model.W_K, model.W_V, model.W_O], c[i], retain_graph=True)
                  for i in range(len(part))]  # fmt: skip
    for name, expected in zip(("W_K", "W_V", "W_O"), zip(*parts, strict=True), strict=True):
        total = found.gradients().dense()[name].unflatten(0, (70, 6)).sum(1)
        torch.testing.assert_close(total, torch.stack(expected))


def test_a_chunk_of_one_example_is_read_like_the_others() -> None:
    model, x = Heads(), torch.randn(positions.CHUNK + 1, 6, 5)
    found, last = gather(model, x), positions.CHUNK * 6
    assert len(found) == len(x) * 6 and all(len(side) == len(found) for side in found.asked.values())
    torch.testing.assert_close(found.data["W_V"][last:], x[-1])
    assert found.norms[last:].min() > 0


def test_the_threshold_of_uses_is_not_taken_for_one_of_samples() -> None:
    model, x = Heads(), torch.randn(8, 6, 5)
    found, pool = positions.collect(model, x, divergence=KL, reference=REFERENCE, parameters=["W_*"])
    d = positions.decompose(
        found, pool, divergence=KL, reference=REFERENCE, n_directions=3, sparsity=ed.BatchTopK(0.3), steps=2
    )
    assert d.encode(x).shape == (48, 3)
    with pytest.raises(ValueError, match=r"sparse=True.*uses"):
        d.encode(x, sparse=True)
    with pytest.raises(ValueError, match="rebuild uses"):
        d.reconstruction_error(x)


def test_norms_selection_and_unit_norm() -> None:
    found = gather(Heads(), torch.randn(70, 6, 5))
    torch.testing.assert_close(found.norms, found.gradients().square_norms().sqrt())
    one = found.select(["W_K"])
    torch.testing.assert_close(one.gradients().dense()["W_K"], found.gradients().dense()["W_K"])
    torch.testing.assert_close(found.alike().norms, torch.ones(len(found)))
    few = found.first(4)
    assert len(few) == 24
    torch.testing.assert_close(few.gradients().dense()["W_V"], found.gradients(slice(0, 24)).dense()["W_V"])


def test_one_seed_gives_the_same_uses() -> None:
    model, x = Heads(), torch.randn(10, 6, 5)
    a, b, c = (gather(model, x, seed=seed).asked["W_V"] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_planted_directions_are_found() -> None:
    model = Heads()
    readers, writers = torch.linalg.qr(torch.randn(5, 5))[0], torch.linalg.qr(torch.randn(6, 6))[0]
    which = torch.randint(4, (600,))
    found = positions.Uses(
        gather(model, torch.randn(4, 6, 5)).select(["W_K"]).target, 6, {"W_K": (0, 2)}, {"W_K": False},
        {"W_K": readers[which]}, {"W_K": writers[which] * torch.rand(600, 1).add(0.5)},
    )  # fmt: skip
    d = positions.decompose(
        found, torch.zeros(0, 4), divergence=KL, reference=REFERENCE, n_directions=4, sparsity=ed.BatchTopK(0.25),
        rank=2, steps=500, batch_size=64, seed=1,
    )  # fmt: skip
    error, kept = positions.reconstruction_error(d, found)
    assert error < 0.02 and 0.9 < kept < 1.1
    owner = positions.coefficients(d, found).abs().argmax(1)
    assert len({(int(a), int(b)) for a, b in zip(which, owner, strict=True)}) == 4
    with d.perturbed({0: 0.1}) as moved:
        assert moved is model


def test_refusals() -> None:
    x = torch.randn(8, 6, 5)
    with pytest.raises(ValueError, match=r"0\.bias.*leave it out"):
        gather(nn.Sequential(nn.Linear(5, 4)), x, ["*"])
