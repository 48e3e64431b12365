"""The benchmark of edits on the story model, with few windows and small dictionaries."""

import math

import pytest
import torch

pytest.importorskip("transformer_lens")
pytest.importorskip("sae_lens")

from rooms.edits import editing
from rooms.edits.workshop import Workshop


@pytest.fixture(scope="module")
def shop() -> Workshop:
    return Workshop(7, units=(8,), fit_windows=60, held_windows=40, length=16, steps=20, sae_steps=20)


def test_the_tail_is_the_model_and_the_probe_makes_the_same_outputs(shop: Workshop) -> None:
    with torch.no_grad():
        expected = shop.model(shop.tokens["test"]).log_softmax(-1).flatten(0, 1)
    probe = shop.held["test"].bench.probe
    torch.testing.assert_close(probe.base, expected, atol=1e-4, rtol=1e-4)
    some = torch.arange(len(expected)) % 7 == 3
    torch.testing.assert_close(probe.among(some).outputs(shop.tail), expected[some], atol=1e-4, rtol=1e-4)


def test_examples_show_their_behaviour_and_their_gradient_is_that_of_their_mass(shop: Workshop) -> None:
    examples = shop.examples("the", 5)
    assert examples.loss(shop.tail(examples.entering).flatten(0, 1)).exp() > 0.5
    g, weight = editing.gradient_of(shop, examples), shop.tail.get_parameter(shop.parameter)
    masses = []
    for delta in (-1e-2, 1e-2):
        with editing.move_of(shop, g)(delta) as moved, torch.no_grad():
            masses.append(examples.loss(moved(examples.entering).flatten(0, 1)).item())
    examples.loss(shop.tail(examples.entering).flatten(0, 1)).backward()
    assert weight.grad is not None
    assert math.isclose((masses[1] - masses[0]) / 2e-2, weight.grad.norm().item(), rel_tol=2e-2)
    torch.testing.assert_close(g, weight.grad / weight.grad.norm(), atol=1e-5, rtol=1e-3)
    weight.grad = None


def test_every_method_makes_an_edit_that_is_scored_at_equal_success(shop: Workshop) -> None:
    settings = {method: grid[0] for method, grid in editing.GRID.items()}
    settings |= {method: {"ridge": 1.0} for method in editing.MADE_OF}
    choice = editing.Choice(dict.fromkeys(editing.DICTIONARIES, 8), settings, [])
    before = shop.model.get_parameter(shop.weight).detach().clone()
    rows = editing.compare(shop, choice, ["the"], 3)
    assert torch.equal(shop.model.get_parameter(shop.weight), before)
    assert [row["method"] for row in rows] == list(editing.METHODS)
    reached = [row for row in rows if row["left"] is not None]
    assert len(reached) >= len(editing.GRID)
    assert all(abs(row["left"] - 0.5) < 0.02 and row["damage"] > 0 for row in reached)


def test_another_seed_shares_the_stories_and_not_the_fits(shop: Workshop) -> None:
    other = shop.reseeded(1, dict.fromkeys(editing.DICTIONARIES, 8))
    assert other.held is shop.held
    assert not torch.equal(other.rows["random"][8].readers, shop.rows["random"][8].readers)
