"""The rules that tell concepts, on a sentence whose answers are known."""

import pytest
import torch

from eigendecomp.targets.stories import model as stories
from rooms.stories.concepts import Concepts, Rules, common, earlier, shifted

TEXT = 'Once upon a time, there was a little girl named Lily. One day, Lily said, "I saw a big dog!" Tim was sad.'


@pytest.fixture(scope="module")
def rules() -> Rules:
    return Rules(stories.load_tokenizer())


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.tensor([[stories.END_ID, *stories.load_tokenizer().encode(TEXT)]])


def where(rules: Rules, tokens: torch.Tensor, name: str) -> list[str]:
    return [rules.text[token] for token in tokens[rules.context(tokens)[name]].tolist()]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("girl's name", [" Lily", " Lily"]),
        ("boy's name", [" Tim"]),
        ("name", [" Lily", " Lily", " Tim"]),
        ("animal", [" dog"]),
        ("emotion", [" sad"]),
        ("past-tense verb", [" was", " said", " saw", " was"]),
        ("sentence end", [".", '!"', "."]),
        ("inside quotation marks", ["I", " saw", " a", " big", " dog", '!"']),
        ("follows Once upon a", [" time"]),
        ("follows One day", [","]),
        ("follows named", [" Lily"]),
        ("follows a name", [".", " said", " was"]),
        ("follows an adjective", [" girl", " dog", "."]),
        ("start of a sentence", ["Once", " One", " Tim"]),
        ("a name that was mentioned before", [" Lily"]),
        ("rest of a word", []),
    ],
)
def test_context_rules(rules, tokens, name, words) -> None:
    assert where(rules, tokens, name) == words


def test_first_sentence_needs_the_start_of_the_story(rules, tokens) -> None:
    assert where(rules, tokens, "first sentence of the story")[-2:] == [" named", " Lily"]
    assert where(rules, tokens[:, 1:], "first sentence of the story") == []


def test_rest_of_a_word(rules) -> None:
    tokens = torch.tensor([stories.load_tokenizer().encode("Lily saw a happiness.")])
    pieces = where(rules, tokens, "rest of a word")
    assert pieces and "happiness".endswith("".join(pieces))


def says(rules: Rules, tokens: torch.Tensor, chances: dict[str, float]) -> set[str]:
    """Prediction concepts that hold at the last position if these tokens have these probabilities."""
    p = torch.full((*tokens.shape, len(rules.text)), 1e-9)
    for text, chance in chances.items():
        p[0, -1, rules.text.index(text)] = chance
    return {name for name, found in rules.prediction(tokens, p).items() if found[0, -1]}


def test_prediction_rules(rules, tokens) -> None:
    found = says(rules, tokens, {" Lily": 0.5, " Tim": 0.05, " she": 0.3, " he": 0.1})
    assert {"says: name", "says: girl's name", "she rather than he", "a girl's name rather than a boy's"} <= found
    assert {"says: a name that it said before"} <= found
    assert not {"says: boy's name", "he rather than she", "says: sentence end"} & found
    assert says(rules, tokens, {".": 0.97}) >= {"says: sentence end", "certain (one token has 95%)"}
    after_big = tokens[:, : (tokens[0] == rules.text.index(" big")).nonzero()[0, 0] + 1]
    assert "says: a noun after an adjective" in says(rules, after_big, {" dog": 0.6})
    assert "says: a noun after an adjective" not in says(rules, tokens, {" dog": 0.6})


def test_a_word_said_before(rules) -> None:
    tokens = torch.tensor([stories.load_tokenizer().encode(" Tim saw a ball. He saw the")])
    assert "says: a word that it said before" in says(rules, tokens, {" ball": 0.6})
    assert "says: a word that it said before" not in says(rules, tokens, {" dog": 0.6})


def test_every_listed_word_is_of_some_use(rules) -> None:
    for name, members in rules.sets.items():
        assert members.any(), name
    assert not any(members[rules.end] for members in rules.sets.values())


def test_at_least_sixty_concepts_hold_often_enough_in_held_out_stories(rules) -> None:
    model, splits = stories.load_model(), []
    for split in ("validation", "test"):
        tokens = stories.token_windows(stories.load_stories(split), 256, 32, seed=0)
        with torch.no_grad():
            splits.append(rules(tokens, model(tokens)))
    a, b = common(*splits)
    assert a.names == b.names and a.families == b.families and a.truth.shape == (256 * 32, len(a.names))
    assert len(a.of("context")) >= 50 and len(a.of("prediction")) >= 45


def test_common_leaves_out_what_is_rare_in_either() -> None:
    often, rare = torch.arange(100) % 2 == 0, torch.arange(100) == 0
    a = Concepts(["x", "y", "z"], ["context"] * 3, torch.stack([often, often, rare], 1))
    b = Concepts(a.names, a.families, torch.stack([often, ~rare, often], 1))
    assert [c.names for c in common(a, b)] == [["x"], ["x"]]


def test_shifted_and_earlier() -> None:
    assert shifted(torch.tensor([[True, False, True]])).tolist() == [[False, True, False]]
    assert earlier(torch.tensor([[5, 6, 5, 5]])).tolist() == [[False, False, True, True]]
