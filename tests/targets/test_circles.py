"""Circles: what a network does with one decides how many dimensions its gradients have."""

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.reference import Reference
from eigendecomp.targets.toys import manifold
from rooms.curvature.criteria import drawn_gradients
from rooms.own_sample import OwnSample

PLANES = manifold.planes(3, 20, 0)


class Exact(nn.Module):
    """A network of one circle that does its task without error."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task
        turned = torch.linalg.qr(torch.randn(5, 2, generator=torch.Generator().manual_seed(1))).Q
        self.embed = nn.Parameter(turned @ PLANES[0])
        self.back = turned.T

    def forward(self, x: Tensor) -> Tensor:
        a, b = (x @ self.embed.T @ self.back.T).unbind(-1)
        return manifold.TASKS[self.task](torch.atan2(b, a), (a * a + b * b).sqrt())


@pytest.mark.parametrize("task, zero, drawn", [
    ("coordinate", 2, 2), ("radius", 3, 3), ("copy", 3, 4), ("double", 3, 4), ("triple", 3, 4),
])  # fmt: skip
def test_gradients_have_the_predicted_dimensions(task: str, zero: int, drawn: int) -> None:
    draw = torch.Generator().manual_seed(0)
    angle, radius = 6.3 * torch.rand(60, generator=draw), 0.5 + torch.rand(60, generator=draw) / 2
    x = manifold.point(angle, radius) @ PLANES[0]
    references: dict[Reference, int] = {ed.Constant(0.0): zero, OwnSample(): drawn}
    for reference, number in references.items():
        g = drawn_gradients(Exact(task), x, ed.SquaredError(), reference, 3, draw).flatten(0, 1)
        size = torch.linalg.svdvals(g)
        assert size[number - 1] > 0.05 * size[0] and size[number] < 1e-4 * size[0]


def test_the_references_of_a_circle_leave_other_outputs_alone() -> None:
    reference, f = OwnSample(circles=3), torch.tensor([[0.1, 0, 0.5, 0.5, 0, 0.2], [0.6, 0, 0, 0.1, 0, 0.0]])
    noise = torch.ones(2, 6)
    c = reference.cotangent(ed.SquaredError(), f, torch.zeros(0, 6), noise)
    whole = ed.ModelSample().cotangent(ed.SquaredError(), f, torch.zeros(0, 6), noise)
    own = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    assert torch.equal(c, whole * own) and whole.all()


@pytest.mark.parametrize("task", manifold.TASKS)
def test_one_circle_is_on_and_its_outputs_are_its_own(task: str) -> None:
    x = manifold.alone(50, PLANES, 0)
    size = torch.einsum("ni,cpi->ncp", x, PLANES).norm(dim=-1)
    assert len(x) == 50 and ((size > 1e-3).sum(1) == 1).all()
    x, y = manifold.data(200, PLANES, torch.Generator().manual_seed(0), task=task)
    on = torch.einsum("ni,cpi->ncp", x, PLANES).norm(dim=-1) > 1e-3
    assert not y.unflatten(1, (3, -1))[~on].any()
    assert y.shape == (200, 3 if task in ("coordinate", "radius") else 6)
