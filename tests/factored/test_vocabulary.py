"""What a large vocabulary takes: of arrays that are as large as all outputs, few are there at a time."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendecomp as ed
from eigendecomp.batches import LiveBatches
from eigendecomp.factored.source import CapturedSource
from eigendecomp.reference import Draws
from eigendecomp.target import Target
from rooms.cost.benchmark import peak_memory
from rooms.cost.sizes import Transformer

VOCABULARY, EXAMPLES, POSITIONS = 20_000, 64, 8
ALL = 4 * VOCABULARY * EXAMPLES * POSITIONS  # bytes of all outputs of a batch


def captured(parameters: str, draws: int = 1, **options: Any) -> tuple[CapturedSource, tuple[Tensor], Draws]:
    torch.manual_seed(0)
    target = Target(Transformer(VOCABULARY, 8, 2, 1, POSITIONS).eval(), [parameters])
    examples = (torch.randint(VOCABULARY, (EXAMPLES, POSITIONS)),)
    pool = torch.randn(4, VOCABULARY).softmax(-1)
    given = ed.OtherSample(), ed.KLDivergence(), pool, (EXAMPLES, POSITIONS), draws, torch.Generator().manual_seed(0)
    return CapturedSource(target, examples, **options), examples, Draws.of(*given)


def test_cotangents_take_no_more_than_themselves() -> None:
    draws = captured("attention*")[2]
    f = torch.randn(EXAMPLES, POSITIONS, VOCABULARY)
    assert peak_memory(lambda: draws(f)) < 2.5 * ALL  # they, and what makes some of them
    assert torch.equal(draws(f), torch.cat([draws[i : i + 1](f[i : i + 1]) for i in range(EXAMPLES)]))


def test_a_look_at_gradients_takes_little() -> None:
    source, examples, draws = captured("attention*")
    gradients = source(examples, draws)
    assert peak_memory(lambda: source.guard.wrong([(examples, draws)], gradients.weighted)) < 2.5 * ALL
    assert not source.guard.wrong([(examples, draws)], gradients.weighted)
    part = gradients.parts[0]
    weighted = lambda weights: {name: g * (1 + 1e-2) for name, g in gradients.weighted(weights).items()}  # noqa: E731
    assert source.guard.wrong([(examples, draws)], weighted) and part


@pytest.mark.parametrize("parameters", ["attention*", "unembed*"])
def test_a_batch_takes_few_arrays_of_all_outputs(parameters: str) -> None:
    source, examples, draws = captured(parameters)
    source(examples, draws)
    assert peak_memory(lambda: source.gradients(examples, draws)) < (5.5 if parameters == "unembed*" else 3.8) * ALL


def test_cotangents_count_among_what_a_chunk_may_take() -> None:
    source, examples, draws = captured("attention*", draws=8, budget=2 * ALL)
    assert peak_memory(lambda: source(examples, draws).square_norms()) < 4 * ALL  # of 8 draws for each output


def test_what_goes_back_to_one_place_is_there_once() -> None:
    torch.manual_seed(0)
    target, x = Target(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))), (torch.randn(6, 2, 3),)
    source = CapturedSource(target, x, form=False)
    trace, f = source.run(x)
    deltas = source._pulled(source.reading, trace, f.unsqueeze(2), 0)
    by_name = dict(zip((use.name for use in trace.uses), deltas, strict=True))
    assert by_name["2.weight"] is by_name["2.bias"]


def test_no_batch_is_there_while_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[weakref.ref] = []
    batch = LiveBatches.batch

    def watched(self: LiveBatches, *arguments: Any) -> Any:
        assert not any(reference() for reference in given)
        made = batch(self, *arguments)
        given.append(weakref.ref(made))
        return made

    monkeypatch.setattr("eigendecomp.factored.data.CACHE_BYTES", 0)
    monkeypatch.setattr(LiveBatches, "batch", watched)
    for prune in (None, 0.01):
        ed.decompose(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(600, 3), steps=8, batch_size=64,
            prune=prune, progress=False,
        )  # fmt: skip
        assert len(given) > 8
