"""The words of factors, against directions formed and multiplied out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed

TOKENS = torch.randint(9, (24, 5), generator=torch.Generator().manual_seed(0))
WORDS = [f"w{i}" for i in range(9)]


class Speaker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.up, self.down, self.out = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.out(h + self.down(self.up(h.cumsum(1)).tanh()))


def decomposed(parameters: tuple[str, ...], **options: Any) -> ed.Decomposition:
    model = Speaker().double()
    options = {"n_directions": 3, "rank": 1, "steps": 2, "batch_size": 8, "progress": False} | options
    return ed.decompose(model, TOKENS, divergence=ed.KLDivergence(), parameters=parameters, **options)


def test_words_are_those_of_the_formed_direction() -> None:
    d = decomposed(("up.weight", "down.weight", "down.bias"))
    unembedding = d.target.model.get_parameter("out.weight").detach()
    rows = d.readout(unembedding, k=3, names=WORDS)
    assert [(one.direction, one.parameter, one.axis, one.side) for one in rows] == [
        (v, *rest)
        for v in range(3)
        for rest in (("up.weight", 1, "reads"), ("down.weight", 0, "writes"), ("down.bias", 0, "writes"))
    ]
    for one in rows:
        u = d.directions()[one.parameter][one.direction]
        # Of a rank-one matrix the columns or rows are all multiples of the factor, whose sign is free.
        vector = u if u.ndim == 1 else u.select(1 - one.axis, 0)
        scores = unembedding @ vector
        order = [WORDS[i] for i in scores.argsort(descending=True).tolist()]
        both = ([word for word, _ in one.promoted], [word for word, _ in one.suppressed])
        ends = (order[:3], order[::-1][:3])
        assert both == ends or (u.ndim == 2 and both == ends[::-1])
        values = [value for _, value in one.promoted]
        assert values == sorted(values, reverse=True)


def test_every_factor_of_that_width_and_its_values() -> None:
    for factorization, rank in (("cp", 2), ("tucker", 3)):
        d = decomposed(("up.weight", "embed.weight"), factorization=factorization, rank=rank)
        matrix, other = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
        rows = d.readout(matrix, k=99, embedding=other)
        assert len(rows) == 3 * 2 * rank and all(len(one.promoted) == 20 for one in rows)
        for one in rows:
            held = d.decoder.factors[one.parameter][one.axis + (factorization == "tucker")]
            scores = (other if one.side == "reads" else matrix) @ held[one.direction, one.term]
            assert {i: pytest.approx(float(scores[int(i)])) for i, _ in one.promoted} == dict(one.promoted)
            assert one.side == {"up.weight": "reads", "embed.weight": "writes"}[one.parameter]


def test_names_may_be_a_function() -> None:
    d = decomposed(("up.weight",))
    rows = d.readout(torch.randn(5, 4), 2, lambda i: f"<{i}>")
    assert all(str(word).startswith("<") for one in rows for word, _ in one.promoted)


def test_bad_matrices_are_refused() -> None:
    d = decomposed(("up.weight",))
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("no factor is 5 long", torch.randn(9, 5), {}),
        ("unembedding must be", torch.randn(9), {}),
        ("unembedding must be", torch.ones(9, 4, dtype=torch.long), {}),
        ("names holds 3", torch.randn(9, 4), {"names": ["a", "b", "c"]}),
        ("not as wide", torch.randn(9, 4), {"embedding": torch.randn(9, 3)}),
        ("k=0", torch.randn(9, 4), {"k": 0}),
    ]
    for words, matrix, options in bad:
        with pytest.raises(ValueError, match=words):
            d.readout(matrix, **options)
