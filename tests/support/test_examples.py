"""Inputs may be tensors, map-style, iterable or tabular datasets, and say clearly when they cannot."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

import eigendecomp as ed
from eigendecomp.support import examples

SETTINGS: dict[str, Any] = dict(n_directions=4, steps=20, batch_size=16, progress=False)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))


X = torch.randn(70, 3, generator=torch.Generator().manual_seed(1))


class Endless(IterableDataset):
    """Reads rows one by one and counts how many are held at a time."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)


def test_every_kind_of_dataset_reads_as_its_tensor() -> None:
    from datasets import Dataset

    table = Dataset.from_dict({"x": X.tolist()}).with_format("torch")
    whole = list(examples.chunks(X, 16))
    kinds: list[Any] = [(X,), [X], TensorDataset(X), Endless(X), table]
    for inputs in kinds:
        parts = list(examples.chunks(inputs, 16))
        assert len(parts) == len(whole)
        for (part,), (expected,) in zip(parts, whole, strict=True):
            assert torch.equal(part, expected)


def test_a_fit_on_a_map_style_dataset_is_the_fit_on_its_tensor() -> None:
    a = ed.decompose(model(), X, **SETTINGS)
    b = ed.decompose(model(), TensorDataset(X), **SETTINGS)
    assert torch.equal(a.decoder.flat(), b.decoder.flat())


def test_reading_samples_does_not_depend_on_the_kind_of_inputs() -> None:
    d = ed.decompose(model(), X, **SETTINGS)
    for inputs in (TensorDataset(X), Endless(X)):
        for read in (d.encode, d.activation, d.impact):
            torch.testing.assert_close(read(inputs), read(X))
        assert d.reconstruction_error(inputs) == pytest.approx(d.reconstruction_error(X))


@pytest.mark.parametrize("by", ["impact", "activation"])
def test_top_samples_are_those_of_the_whole_matrix(by: str) -> None:
    d = ed.decompose(model(), X, **SETTINGS)
    whole = d.impact(X) if by == "impact" else d.activation(X)
    values, rows = d.top(Endless(X), 5, by)
    torch.testing.assert_close(values, whole.topk(5, 0).values.T)
    torch.testing.assert_close(whole.T.gather(1, rows), values)
    assert d.top(X[:3], 5, by)[1].shape == (4, 3)


def test_codes_of_the_first_samples_do_not_depend_on_the_later_ones() -> None:
    d = ed.decompose(model(), torch.cat([X, X + 1]), **SETTINGS)
    torch.testing.assert_close(d.encode(X[:10], seed=3), d.encode(torch.cat([X, X]), seed=3)[:10])


def test_iterable_dataset_trains_and_finds_its_place_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "BUFFER", 8)
    d = ed.decompose(model(), Endless(X), **SETTINGS)
    assert d.history.error[-1] < d.history.error[0]
    feed = examples.Buffered(Endless(X), torch.Generator().manual_seed(2))
    feed.take(100)
    state = feed.state()
    expected = [feed.take(7)[0] for _ in range(5)]
    again = examples.Buffered(Endless(X), torch.Generator().manual_seed(2))
    again.restore(state)
    assert all(torch.equal(again.take(7)[0], rows) for rows in expected)


def test_iterable_dataset_gives_every_example_about_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "BUFFER", 8)
    feed = examples.Buffered(Endless(torch.arange(20.0)), torch.Generator().manual_seed(0))
    counts = torch.bincount(feed.take(2000)[0].long(), minlength=20)
    assert counts.min() >= 95 and counts.max() <= 105


class Raises(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("read")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", "is a str"),
        ({"x": X}, "unexpected keyword argument 'x'"),
        ({0: X}, "the keys \\[0\\]"),
        (iter([X]), "read only once"),
        ([], "empty tuple"),
        (X[:0], "zero examples"),
        (torch.tensor(1.0), "single number"),
        ((X, X[:3]), r"\[3, 70\] examples"),
        ([X, "a"], r"inputs\[1\] is a str"),
        (torch.full((4, 3), float("nan")), "NaN or infinity, first in example 0"),
        (TensorDataset(X[:0]), "zero examples"),
        (Endless(X[:0]), "zero examples"),
        (Endless(torch.full((4, 3), float("inf"))), "NaN or infinity"),
        (3, "is a int"),
        (None, "is a NoneType"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ed.decompose(model(), inputs, **SETTINGS)


def test_a_table_of_several_columns_is_refused_with_their_names() -> None:
    from datasets import Dataset

    table = Dataset.from_dict({"x": X.tolist(), "label": [0] * len(X)}).with_format("torch")
    with pytest.raises(ValueError, match="'label', 'x'"):
        ed.decompose(model(), table, **SETTINGS)  # pyright: ignore[reportArgumentType]
