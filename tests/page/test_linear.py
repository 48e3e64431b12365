"""A run taken apart into linear steps: the same derivative as ``torch.func.jvp``'s, or none."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import eigendecomp as ed
from eigendecomp.curvature import push_forward
from eigendecomp.directions import Directions
from eigendecomp.page import linear
from eigendecomp.target import Target


class Odd(nn.Module):
    """Operations of many kinds: entry by entry, with two changes, over positions, joined, and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.a(x), approximate="tanh") * torch.sigmoid(self.b(x))
        scores = (h @ self.a(h).mT).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
        h = self.norm(x + scores.softmax(-1) @ h)
        low, high = h.chunk(2, -1)
        return torch.cat([low * high, high - low.mean(1, keepdim=True), h.square().sum(-1, keepdim=True)], -1)


class Stopped(Odd):
    """Part of it has no derivative, which a run does not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.a(x).detach().sum(-1, keepdim=True)


def pushed(model: nn.Module, memory: int = 1 << 28) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    target, x = Target(model.double().eval()), torch.randn(7, 5, 6, dtype=torch.float64)
    u = Directions.random(target.shapes, 9, 2, dtype=torch.float64)
    f, y = zip(*linear.outputs_along(target, u, (x,), 4, memory), strict=True)
    torch.testing.assert_close(torch.cat(f), target.outputs((x,)).flatten(0, 1))
    return torch.cat(y), push_forward(target, ed.SquaredError(), u, (x,)) / 2**0.5


@pytest.mark.parametrize("memory", [1, 1 << 28])
def test_steps_make_the_derivative(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "CACHE", 2048)
    found, true = pushed(Odd(), memory)
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def test_what_is_not_followed_is_differentiated_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    with caplog.at_level("INFO"):
        found, true = pushed(Stopped())
    assert "differentiated as a whole" in caplog.text
    torch.testing.assert_close(found, true)
