"""Contexts, pushes and matches of units, on small models whose answers are known."""

from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.interventions import Probe, displaced, probabilities
from eigendecomp.targets import stories, story_units


@pytest.fixture
def probe() -> Probe:
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    return Probe(model, torch.cat([torch.eye(3)] * 20), view=probabilities)


def move(probe: Probe, unit: int):
    change = torch.zeros(5, 3)
    change[1, unit] = 1.0
    return displaced(probe.model, {"weight": change})


def test_a_push_reaches_its_level_and_only_its_samples(probe) -> None:
    on = torch.arange(60) % 3 == 2
    for first in (0.01, 1.0, 30.0, -0.01):
        reach = story_units.push(probe, move(probe, 2), on, 0.1, first=first)
        assert reach is not None and abs(reach.on - 0.1) <= 0.005 and reach.off < 1e-6
        assert reach.step * first > 0 and reach.selectivity > 1e6
    assert reach.toward.sum().abs() < 1e-5 and reach.toward.argmin() == 1


def test_a_level_out_of_reach_is_told(probe) -> None:
    assert story_units.push(probe, move(probe, 2), torch.arange(60) % 3 == 1, 0.1) is None
    assert story_units.pushed_both_ways(probe, move(probe, 2), torch.arange(60) % 3 == 1, 0.1, first=1.0) is None


def test_the_better_sign_counts(probe) -> None:
    @contextmanager
    def lopsided(delta: float):
        names = {"weight": torch.zeros(5, 3)}
        names["weight"][1, 2] = delta
        if delta < 0:
            names["weight"][1, 0] = delta
        with displaced(probe.model, names)(1.0) as model:
            yield model

    on = torch.arange(60) % 3 == 2
    for first in (0.1, -0.1):
        reach = story_units.pushed_both_ways(probe, lopsided, on, 0.1, first=first)
        assert reach is not None and reach.step > 0


def test_strongest_and_found_again() -> None:
    assert story_units.strongest(torch.tensor([3.0, 1.0, 2.0, 0.0]), 0.5).tolist() == [True, False, True, False]
    assert not story_units.strongest(torch.zeros(4), 0.5).any()
    a = torch.eye(3)
    assert story_units.found_again(a, -2 * a[:2]) == pytest.approx(2 / 3)


def test_contexts_show_the_strongest_token_in_bold() -> None:
    ids = [0, *stories.load_tokenizer().encode("Once upon a time, there was a cat.")]
    tokens = torch.tensor([ids, ids])
    scores = torch.zeros(2, len(ids))
    scores[1, 4], scores[0, 2] = 3.0, 1.0
    first, second = story_units.contexts(tokens, scores.flatten(), 2)
    assert story_units.bold(first) == "[start] Once upon a **time**, there … (3.0)"
    assert second[1] == " upon" and second[3] == 1.0


def test_promoted_tokens_are_those_that_gain() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2048))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bias + x

    model, token = Constant(), stories.load_tokenizer().encode(" cat")[0]
    probe = Probe(model, torch.randn(6, 1), view=lambda f: f.softmax(-1) + torch.arange(6)[:, None])
    change = torch.zeros(2048)
    change[token] = 1.0
    up, _ = story_units.promoted(probe, displaced(model, {"bias": change}), 2.0, torch.ones(6, dtype=torch.bool), 1)
    assert up == [" cat"]


def test_a_gated_step_is_the_step_where_the_gate_is_open_and_nothing_where_it_is_shut() -> None:
    model = stories.load_model()
    tokens = stories.token_windows(stories.load_stories("validation")[:20], 6, 12)
    d = ed.decompose(
        model, tokens, divergence=ed.KLDivergence(), n_directions=2, steps=2, batch_size=24, progress=False,
        parameters=["blocks.4.attn.W_[QKV]"],
    )  # fmt: skip
    with torch.no_grad():
        before = model(tokens)
        for threshold, expected in ((-1e9, 3.0), (1e9, 0.0)):
            with d.perturbed({1: expected}):
                after = model(tokens)
            with story_units.gated(d, 4, 1, torch.ones(64), threshold)(3.0) as moved:
                torch.testing.assert_close(moved(tokens), after, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(tokens), before)


def test_table_in_markdown() -> None:
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "y"], "c": [0, 0]})
    assert story_units.markdown(table, ["a", "b"]).splitlines() == ["| a | b |", "|---|---|", "| 1 | x |", "| 2 | y |"]
