"""Edits of residual networks, memorised text and the classifier: what is scored, and the moves that are made for it."""

import math

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("transformer_lens")
pytest.importorskip("sae_lens")

from eigendecomp.study.moves import displaced
from eigendecomp.targets.fashion import network as cnn
from rooms.edits import classifier, editors, memorised, residual, summary


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- residual networks


@pytest.fixture(scope="module")
def network() -> residual.Network:
    return residual.Network(2, 0, steps=10, steps_of_one=10, training_steps=200, sae_steps=10)


def test_a_feature_is_gone_where_the_layers_add_nothing(network: residual.Network) -> None:
    task = residual.Task(network, 3, 4, 0.25)
    zero = {name: -p.detach() for name, p in network.model.named_parameters()}
    nothing = task.switch["test"].effect(displaced(network.model, zero), 1.0)
    assert nothing.left < 1e-9 and math.isclose(nothing.elsewhere, 1, rel_tol=1e-4)
    still = task.switch["test"].effect(displaced(network.model, zero), 0.0)
    assert math.isclose(still.left, 1, rel_tol=1e-5) and still.elsewhere == 0
    assert task.worst(displaced(network.model, zero), 0.0) == 0


def test_the_gradient_is_that_of_what_the_layers_add(network: residual.Network) -> None:
    task, model = residual.Task(network, 3, 4, 0.25), network.model
    x = task.examples[:4]
    off = residual.without(x, 3)
    added = (model.computed(x) - model.computed(off))[:, 3].square().mean()
    grads = torch.autograd.grad(added, list(model.parameters()))
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    for (name, _), g in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(task.gradient[name], -g / norm, atol=1e-5, rtol=1e-3)


def test_edits_are_scored_where_as_much_is_left_and_leave_the_network_as_it_is(network: residual.Network) -> None:
    before = {name: p.detach().clone() for name, p in network.model.named_parameters()}
    rows = residual.compare(
        residual.Task(network, 3, 4, 0.25), {name: grid[-1] for name, grid in residual.GRID.items()}
    )
    assert all(torch.equal(before[name], p) for name, p in network.model.named_parameters())
    assert [row["method"] for row in rows] == list(residual.METHODS)
    reached = [row for row in rows if row["left"] is not None]
    assert len(reached) > len(rows) / 2
    assert all(abs(row["left"] - 0.25) < 0.01 and row["damage"] > 0 for row in reached)


# ---- memorised text


def test_the_small_curvature_part_costs_less_and_the_parts_make_the_whole() -> None:
    x, asked = (torch.randn(300, n, generator=draw(n)).double() * torch.arange(1, n + 1) for n in (5, 7))
    site, g = editors.Site(x, asked), torch.randn(5, 7, generator=draw(0)).double()
    small = memorised.filtered(g, site, 0.5)
    torch.testing.assert_close(memorised.filtered(g, site, 1.0), g)

    def cost(change: Tensor) -> float:
        return (torch.trace(change.mT @ site.inputs @ change @ site.outputs) / change.square().sum()).item()

    assert cost(small) < 0.1 * cost(g - small)
    assert abs((small * (g - small)).sum().item()) < 1e-9


class Repeats(nn.Module):
    """Says that the next token is the last one plus one."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 50.0 * F.one_hot(tokens + 1, 200).float()


def test_verbatim_counts_up_to_the_first_miss_and_the_loss_is_of_what_follows_the_prompt() -> None:
    known = torch.arange(memorised.PROMPT + 4).unsqueeze(0)
    other = known.clone()
    other[0, memorised.PROMPT + 1 :] += 7
    assert memorised.spoken(Repeats(), known) == 1
    assert memorised.spoken(Repeats(), other) == 0.25
    f = torch.randn(known.numel(), 200, generator=draw(1))
    by_hand = [-f[t - 1].log_softmax(-1)[known[0, t]] for t in range(memorised.PROMPT, known.numel())]
    torch.testing.assert_close(memorised.next_token_loss(f, known), torch.stack(by_hand).mean())


def test_a_copy_learns_its_windows_by_heart() -> None:
    shop = memorised.Overtrained(0, 7, windows=2, length=24, until=0.8, ordinary=20)
    learned = memorised.learned_by_heart(shop)
    assert memorised.loss_of(learned, shop.memorised) <= 0.8 < memorised.loss_of(shop.before, shop.memorised)


# ---- the classifier


def test_the_head_with_standard_inputs_is_the_network() -> None:
    model = cnn.load_model()
    images = torch.rand(6, 1, 28, 28, generator=draw(2))
    x = classifier.pooled(model, images)
    mean, deviation = x.mean(0), x.std(0) + 0.1
    head = classifier.Head(model.head, mean, deviation)
    with torch.no_grad():
        torch.testing.assert_close(head((x - mean) / deviation), model(images), atol=1e-4, rtol=1e-4)


def test_a_confusion_is_where_the_network_leans_to_another_class() -> None:
    p = torch.full((3, 10), 0.05)
    p[0, 2], p[1, 2], p[2, 4] = 0.55, 0.3, 0.55
    labels = torch.tensor([4, 4, 4])
    told = {concept: torch.zeros(3, dtype=torch.bool) for _, concept in classifier.CONCEPTS.values()}
    found = classifier.behaviours(p, labels, told)["coat as pullover"]
    assert found.on.tolist() == [True, True, False] and found.members.nonzero().tolist() == [[2]]


# ---- summaries


def test_costs_are_paired_over_the_cases_that_both_reach() -> None:
    rows = pd.DataFrame([
        {"behaviour": b, "seed": s, "method": m, "damage": d, "worst": d, "seconds": 1.0, "bytes": 4, "examples": 10}
        for b, s, m, d in (
            ("a", 0, "one direction", 1.0), ("a", 0, "x", 2.0), ("b", 0, "one direction", 10.0), ("b", 0, "x", 20.0),
            ("c", 0, "one direction", 1e-3), ("c", 0, "x", None),
        )
    ])  # fmt: skip
    middle, low, high = summary.ratio(rows, "x", draws=50)
    assert all(math.isclose(value, math.log(2)) for value in (middle, low, high))
    table = summary.compared(rows, draws=50).set_index("method")
    assert table.loc["x", "reached"] == 2 and table.loc["x", "of"] == 3
    assert table.loc["one direction", "best_in"] == 3 and math.isclose(table.loc["x", "cost"], 2)
