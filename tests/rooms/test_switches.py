"""Switching off: on a network in which every feature has a neuron of its own, and what is done elsewhere is counted."""

import pytest
import torch
from torch import nn

from eigendecomp.study.moves import displaced
from rooms import switches
from rooms.switches import Effect, Switch


class Own(nn.Module):
    """Three features, a neuron each."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.read.weight.copy_(torch.eye(3))
            self.write.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(self.read(x).relu())


@pytest.fixture
def task() -> Switch:
    draw = torch.Generator().manual_seed(0)
    on, data = torch.rand(20, 3, generator=draw), 2 * torch.rand(50, 3, generator=draw) - 1
    return Switch(Own(), lambda model, x: model(x), on, data, 1)


def test_without_its_neuron_a_feature_is_gone_and_the_others_are_as_they_were(task: Switch) -> None:
    move = switches.without(task.model, "write.weight", 1)
    for step, share in ((0.0, 1.0), (0.5, 0.25), (1.0, 0.0), (2.0, 1.0)):
        effect = task.effect(move, step)
        assert effect.left == pytest.approx(share, abs=1e-6)
        assert effect.beside == effect.elsewhere == 0
    found = task.off(move, 3.0)
    assert found.left < 1e-3 and found.step == pytest.approx(1, abs=0.05)


def test_the_way_of_a_direction_is_found(task: Switch) -> None:
    change = torch.zeros(3, 3)
    change[1, 1] = 1.0
    found = task.off(displaced(task.model, {"read.weight": change}), 1.5, both=True)
    assert found.left < 1e-3 and found.step == pytest.approx(-1, abs=0.05)


def test_what_happens_to_another_feature_is_elsewhere_and_beside(task: Switch) -> None:
    effect = task.effect(switches.without(task.model, "write.weight", 2), 1.0)
    assert effect.left == 1 and effect.beside > 0
    base = task.base[2 * task.size :][task.off_in_data]
    share = base[:, 2].square().sum() / base.square().sum()
    assert effect.elsewhere == pytest.approx(share.item())


def test_the_best_place_spoils_and_leaves_least_together() -> None:
    effects = [Effect(1.0, 0.5, 0.0, 0.1), Effect(2.0, 0.1, 0.0, 0.2), Effect(3.0, 0.0, 9.0, 0.9)]
    assert switches.best(effects).step == 2.0
