"""The file for labelling, against the impacts and the inputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed

WORDS = [f" w{i}" for i in range(50)]
TOKENS = torch.randint(50, (12, 6), generator=torch.Generator().manual_seed(0))


class Speaker(nn.Module):
    """Logits at every position, or at the last one alone."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.out, self.whole = nn.Embedding(50, 4), nn.Linear(4, 50), whole

    def forward(self, x: Tensor) -> Tensor:
        h = self.out(self.embed(x).cumsum(1).tanh())
        return h[:, -1] if self.whole else h


def decomposed(model: nn.Module, x: Any) -> ed.Decomposition:
    return ed.decompose(model, x, parameters=("out.weight",), n_directions=3, steps=2, batch_size=8, progress=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def test_contexts_are_those_of_most_and_of_middling_impact(tmp_path: Path) -> None:
    d = decomposed(Speaker(), TOKENS)
    path = d.explain(tmp_path / "lines.jsonl", TOKENS, WORDS, k=4, seed=1, window=3)
    impact = d.impact(TOKENS, seed=1)
    rows = lines(path)
    assert [row["direction"] for row in rows] == [0, 1, 2]
    for v, row in enumerate(rows):
        strengths, best = impact[:, v].sort(descending=True)
        assert [6 * one["example"] + one["position"] for one in row["top"]] == best[:4].tolist()
        middling = [one["impact"] for one in row["middling"]]
        assert strengths[4] >= middling[0] >= middling[-1] >= strengths[-1]
        assert sum(strengths > middling[0]) >= 24 and sum(strengths < middling[-1]) >= 24
        for one in [*row["top"], *row["middling"]]:
            e, p = one["example"], one["position"]
            assert one["tokens"] == TOKENS[e, max(0, p - 2) : p + 1].tolist()
            assert one["text"] == "".join(WORDS[token] for token in one["tokens"])
            assert one["impact"] == pytest.approx(float(impact[6 * e + p, v]))


def test_the_intruder_is_the_one_that_is_not_among_the_top(tmp_path: Path) -> None:
    d = decomposed(Speaker(), TOKENS)
    answers = set()
    for seed in range(4):
        for row in lines(d.explain(tmp_path / "lines.jsonl", TOKENS, WORDS, k=4, seed=seed)):
            shown, answer = row["intruder"]["contexts"], row["intruder"]["answer"]
            top = [one["text"] for one in row["top"]]
            assert len(shown) == 5 and all(set(one) == {"tokens", "text"} for one in shown)
            assert [i for i, one in enumerate(shown) if one["text"] not in top] == [answer]
            answers.add(answer)
    assert len(answers) > 1


def test_the_seed_decides(tmp_path: Path) -> None:
    d = decomposed(Speaker(), TOKENS)
    path = tmp_path / "lines.jsonl"
    written = [d.explain(path, TOKENS, k=2, seed=seed).read_bytes() for seed in (0, 0, 1)]
    assert written[0] == written[1] != written[2]


def test_a_whole_text_and_a_dataset(tmp_path: Path) -> None:
    d = decomposed(Speaker(whole=True), TOKENS)
    texts = d.explain(tmp_path / "a.jsonl", TOKENS, WORDS, k=2)
    again = d.explain(tmp_path / "b.jsonl", torch.utils.data.TensorDataset(TOKENS), WORDS.__getitem__, k=2)
    assert texts.read_bytes() == again.read_bytes()
    for one in lines(texts)[0]["top"]:
        assert one["position"] == 0 and one["tokens"] == TOKENS[one["example"]].tolist()


def test_other_inputs_are_given_by_their_values(tmp_path: Path) -> None:
    x = torch.randn(20, 5)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    d = ed.decompose(model, x, n_directions=2, steps=2, batch_size=8, progress=False)
    for row in lines(d.explain(tmp_path / "lines.jsonl", x)):
        assert all(one["values"] == x[one["example"]].tolist() for one in [*row["top"], *row["middling"]])
        assert row["intruder"]["contexts"][row["intruder"]["answer"]]["values"] in x.tolist()


def test_no_intruder_where_all_reads_alike(tmp_path: Path) -> None:
    model = Speaker()
    d = decomposed(model, TOKENS)
    same = TOKENS[:1].expand(8, -1)[:, :1]
    assert all(row["intruder"] is None for row in lines(d.explain(tmp_path / "lines.jsonl", same, k=2)))


def test_bad_input_is_refused_before_the_work(tmp_path: Path) -> None:
    d, path = decomposed(Speaker(), TOKENS), tmp_path / "lines.jsonl"
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("72 samples are too few for k=19", TOKENS, {"k": 19}),
        ("k=0", TOKENS, {"k": 0}),
        ("names has no string for token", TOKENS, {"names": ["a"]}),
        ("unknown number", iterable(), {}),
    ]
    for words, inputs, options in bad:
        with pytest.raises(ValueError, match=words):
            d.explain(path, inputs, **options)
    with pytest.raises(ValueError, match="does not exist"):
        d.explain(tmp_path / "no" / "where", TOKENS)
    assert not path.exists()


def iterable() -> torch.utils.data.IterableDataset:
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(TOKENS)

    return Rows()
