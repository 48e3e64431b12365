"""Prefixes of sequences: exact where a model is causal, left alone where it is not; and the memory a capture takes."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from eigendecomp.factored.pieces import ByPosition
from eigendecomp.factored.prefix import Prefixes
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.terms import Factored
from eigendecomp.gradients import FunctionalSource
from eigendecomp.support.examples import as_examples
from eigendecomp.target import Target
from rooms.cost.sizes import Transformer
from tests.cases import Chosen, Heads, Model

P, EXACT = 8, 1e-10


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Attention(nn.Module):
    """Attention whose scores may be masked by example, as padded batches have it."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.q, self.v, self.out = (nn.Linear(5, 5) for _ in range(4))
        self.causal = causal
        self.double().eval()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.first(x)
        score = self.q(y) @ y.mT
        hidden = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1) & self.causal
        if mask is not None:
            hidden = hidden | ~mask.bool()[:, None]
        return self.out(y + score.masked_fill(hidden, torch.finfo(score.dtype).min).softmax(-1) @ self.v(y))


def time_first(m: Any, x: Tensor) -> Tensor:
    return m.out(m.mix(m.first(x.transpose(0, 1)).tanh().cumsum(0)).tanh().cumsum(0)).transpose(0, 1)


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.net(x)[0]


def text() -> tuple[nn.Module, Sequence[Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(11, (5, P), generator=torch.Generator().manual_seed(1))
    return Transformer(11, 8, 2, 2, P).double().eval(), (tokens,)


def heads() -> tuple[nn.Module, Sequence[Tensor]]:
    torch.manual_seed(0)
    return Heads().double().eval(), (normal(5, P, 5),)


def along_time() -> tuple[nn.Module, Sequence[Tensor]]:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(5, 4), "mix": nn.Linear(4, 4), "out": nn.Linear(4, 3)}
    return Model(time_first, **parts).double(), (normal(5, P, 5),)


def masked() -> tuple[nn.Module, Sequence[Tensor]]:
    """A dictionary of inputs, in which padding is on the right."""
    mask = (torch.arange(P) < torch.tensor([8, 7, 8, 5, 6])[:, None]).long()
    return Attention(), as_examples({"x": normal(5, P, 5), "mask": mask})


CAUSAL: dict[str, Callable[[], tuple[nn.Module, Sequence[Tensor]]]] = {
    "text": text, "heads": heads, "time first": along_time, "masked": masked,
}  # fmt: skip
OTHERS: dict[str, Callable[[], tuple[nn.Module, Sequence[Tensor]]]] = {
    "attention both ways": lambda: (Attention(causal=False), (normal(5, P, 5),)),
    "a mean": lambda: (Model(lambda m, x: m.out(x - m.out(x).mean(1, True)), out=nn.Linear(5, 5)).double(),
                       (normal(5, P, 5),)),
    "steps": lambda: (Model(recurrent, net=nn.LSTM(5, 4, batch_first=True)).double(), (normal(5, P, 5),)),
    "a fixed length": lambda: (Model(lambda m, x: (m.out(x) + m.place).cumsum(1), out=nn.Linear(5, 5),
                                     place=normal(P, 5)).double(), (normal(5, P, 5),)),
    "outputs that are no sequence": lambda: (Model(lambda m, x: m.out(x).unflatten(1, (P, 5)).cumsum(1),
                                                   out=nn.Linear(5, 5 * P)).double(), (normal(5, 5),)),
}  # fmt: skip


@contextmanager
def prefixes_of(*ends: int) -> Iterator[list[int]]:
    """Inside, prefixes end at these positions whatever they cost; gives the lengths of those that were run."""
    run, ran = Prefixes.run, []

    def counted(self: Prefixes, examples: Sequence[Tensor], q: int) -> Any:
        ran.append(q)
        return run(self, examples, q)

    with patch.object(Prefixes, "ends", lambda *_: list(ends)), patch.object(Prefixes, "run", counted):
        yield ran


def target_of(model: nn.Module, inputs: Any) -> Target:
    """A target that has seen its inputs, and so knows their keywords."""
    target = Target(model)
    target.outputs(inputs)
    return target


def agrees(source: CapturedSource, inputs: Sequence[Tensor], draws: int = 2) -> None:
    """What is captured is what the oracle forms, sample by sample."""
    shape = source.target.call(inputs).shape
    c = Chosen(normal(shape[0], shape[1], draws, shape[2], seed=2))
    loop = any(isinstance(module, nn.RNNBase) for module in source.target.model.modules())
    found = source(inputs, c).flat()
    truth = FunctionalSource(source.target, loop=loop)(inputs, c).flat()
    assert ((found - truth).norm(dim=1) <= EXACT * truth.norm(dim=1).max()).all()


@pytest.mark.parametrize("case", CAUSAL.values(), ids=CAUSAL.keys())
@pytest.mark.parametrize("ends", [(), (4,), (2, 3, 6)])
def test_prefixes_of_causal_models_give_the_gradients_of_the_whole(
    case: Callable[[], tuple[nn.Module, Sequence[Tensor]]], ends: tuple[int, ...]
) -> None:
    model, inputs = case()
    with prefixes_of(*ends) as ran:
        source = CapturedSource(target_of(model, inputs), inputs)
        assert source.prefixes is not None and not source.fallback
        ran.clear()
        agrees(source, inputs)
        assert set(ran) == set(ends)
        one = [x[3:4] for x in inputs]
        agrees(source, one)
        agrees(CapturedSource(target_of(model, inputs), inputs, budget=1), inputs)
    assert source.prefixes is not None


@pytest.mark.parametrize("case", [text, along_time])
def test_prefixes_whose_cotangents_are_pulled_one_by_one_are_the_same(
    case: Callable[[], tuple[nn.Module, Sequence[Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in batches that are large enough for it."""
    monkeypatch.setattr("eigendecomp.factored.record.FEW_SAMPLES", 12)
    model, inputs = case()
    with prefixes_of(2, 5) as ran:
        source = CapturedSource(target_of(model, inputs), inputs)
        ran.clear()
        agrees(source, inputs)
        assert source.prefixes is not None and set(ran) == {2, 5}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
def test_models_that_are_not_causal_take_the_old_way(
    case: Callable[[], tuple[nn.Module, Sequence[Tensor]]],
) -> None:
    model, inputs = case()
    with prefixes_of(4) as ran:
        source = CapturedSource(target_of(model, inputs), inputs)
        assert source.prefixes is None
        ran.clear()
        agrees(source, inputs)
    assert not ran


def test_a_batch_that_is_padded_on_the_left_takes_the_old_way() -> None:
    """Rows that see nothing but padding see all of it, also behind them; the first examples have no padding."""
    mask = torch.ones(6, P, dtype=torch.long)
    mask[4:, :3] = 0
    inputs = as_examples({"x": normal(6, P, 5), "mask": mask})
    with prefixes_of(4) as ran:
        source = CapturedSource(target_of(Attention(), inputs), inputs)
        agrees(source, [x[:4] for x in inputs])
        assert source.prefixes is not None and 4 in ran
        agrees(source, inputs)
        assert source.prefixes is None
        agrees(source, inputs)


def test_the_guard_drops_prefixes_whose_gradients_are_wrong() -> None:
    """Even if nobody compared outputs, gradients that are not autograd's would be found."""
    mask = torch.ones(6, P, dtype=torch.long)
    mask[4:, :3] = 0
    inputs = as_examples({"x": normal(6, P, 5), "mask": mask})
    blind = patch("eigendecomp.factored.prefix.alike", lambda *_: torch.tensor(True))
    with prefixes_of(4) as ran, blind:
        source = CapturedSource(target_of(Attention(), inputs), inputs)
        assert source.prefixes is not None
        ran.clear()
        agrees(source, inputs)
        assert source.prefixes is None and not source.fallback and ran


def test_the_factors_of_early_positions_are_as_short_as_their_prefix() -> None:
    model, inputs = text()
    with prefixes_of(2, 6), patch.object(Factored, "better_formed", lambda *_: False):
        assert CapturedSource(target_of(model, inputs), inputs, form=False).prefixes is None
        source = CapturedSource(target_of(model, inputs), inputs)
        gradients = source(inputs, Chosen(normal(5, P, 1, 11)))
    part = next(part for part in gradients.parts if part.names == ("attention.0.q.weight",))
    assert isinstance(part, ByPosition)
    factored = [piece for piece in part.pieces if isinstance(piece, Factored)]
    assert [side.shape for piece in factored for side in piece.terms[0] if side.shape[0] > 1] == [
        (2, 5, 2), (4, 5, 6), (2, 5, P)
    ]  # fmt: skip


def test_prefixes_are_run_where_they_save_work() -> None:
    model, inputs = text()
    found = CapturedSource(target_of(model, inputs), inputs).prefixes
    assert found is not None and found.ends(4, 1) == []  # all of its time goes into starting functions
    long = CapturedSource(Target(Transformer(11, 32, 2, 1, 96).eval()), (torch.randint(11, (3, 96)),)).prefixes
    assert long is not None
    for numbers in (0, 10**3, 10**6, 10**9):
        long.whole.reading.bytes_per_example = 4 * numbers
        costs = {count: long.cost([96 * (i + 1) // count for i in range(count)], 8, 1) for count in (1, 2, 4, 8)}
        chosen = [*long.ends(8, 1), 96]
        assert len(chosen) == 1 or long.cost(chosen, 8, 1) < costs[1]
        assert long.cost(chosen, 8, 1) <= 1.1 * min(costs.values())
    assert len(chosen) > 3


# ---- memory


def deep(frozen: int, chosen: int) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    layers = [layer for _ in range(frozen + chosen) for layer in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(*layers).eval(), [f"{2 * i}.weight" for i in range(frozen, frozen + chosen)]


@pytest.mark.parametrize("frozen, chosen", [(0, 3), (6, 3), (6, 1)])
def test_the_memory_estimate_is_that_of_the_graph(frozen: int, chosen: int) -> None:
    """At least what autograd keeps for backward passes, at most a small multiple of it: nothing of frozen layers."""
    model, names = deep(frozen, chosen)
    x = torch.randn(4, 32, 16)
    target = Target(model, names)
    source = CapturedSource(target, (x,))
    kept: dict[int, Tensor] = {}
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target.call((x,))
    needed = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in held) / len(x)
    assert needed > 0 and math.isfinite(source.reading.bytes_per_example)
    assert needed <= source.reading.bytes_per_example <= 3 * needed


def test_frozen_layers_below_take_no_memory() -> None:
    x = torch.randn(4, 32, 16)
    few, many = (CapturedSource(Target(*deep(frozen, 2)), (x,)).reading for frozen in (1, 9))
    assert few.bytes_per_example == many.bytes_per_example
