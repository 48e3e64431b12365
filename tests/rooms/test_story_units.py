"""Contexts, pushes and matches of units, on small models whose answers are known."""

import pandas as pd
import pytest
import torch
from torch import nn

import eigendecomp as ed
from eigendecomp.study.moves import Probe, displaced, probabilities
from eigendecomp.targets.stories import model as stories
from rooms.stories import units as story_units


def test_strongest_and_found_again() -> None:
    assert story_units.strongest(torch.tensor([3.0, 1.0, 2.0, 0.0]), 0.5).tolist() == [True, False, True, False]
    assert not story_units.strongest(torch.zeros(4), 0.5).any()
    a = torch.eye(3)
    assert story_units.found_again(a, -2 * a[:2]) == pytest.approx(2 / 3)


def test_context_shows_words_around_a_token() -> None:
    ids = [0, *stories.load_tokenizer().encode('Once upon a time, there was a "dog".\nHe was big and happy.')]
    tokens = torch.tensor(ids)
    at = ids.index(stories.load_tokenizer().encode(" was")[0])
    shown = story_units.token_context(tokens, at, before=2, after=2)
    assert shown == ("… time, there", " was", ' a "dog".¶He …')
    assert story_units.token_context(tokens, 0, after=1) == ("", "[start]", "Once …")
    assert story_units.token_context(tokens, 1, after=1) == ("[start] ", "Once", " upon …")
    assert "".join(story_units.token_context(tokens, -1, before=99)).endswith("big and happy.")
    with pytest.raises(ValueError, match="position is 99"):
        story_units.token_context(tokens, 99)


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


def test_a_probe_from_a_block_sees_what_a_probe_of_tokens_sees() -> None:
    model = stories.load_model()
    tokens = stories.token_windows(stories.load_stories("validation")[:20], 6, 12)
    with torch.no_grad():
        later = story_units.FromBlock(model, model(tokens, stop_at_layer=4), probabilities, 4)
    change = {"blocks.4.attn.W_V": torch.randn(16, 64, 4, generator=torch.Generator().manual_seed(0))}
    whole, move = Probe(model, tokens, probabilities), displaced(model, change)
    torch.testing.assert_close(later.effect(move, 0.1), whole.effect(move, 0.1), rtol=1e-3, atol=1e-4)
    some = torch.arange(72) % 5 == 0
    torch.testing.assert_close(later.among(some).moved(move, 0.1), whole.moved(move, 0.1)[some], rtol=1e-3, atol=1e-5)


def test_table_in_markdown() -> None:
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "y"], "c": [0, 0]})
    assert story_units.markdown(table, ["a", "b"]).splitlines() == ["| a | b |", "|---|---|", "| 1 | x |", "| 2 | y |"]
