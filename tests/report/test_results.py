"""What a notebook reports: numbers made plain, recorded once, written with the run; claims with their verdicts."""

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eigendecomp.report.results import Claim, Results, plain


@pytest.fixture(autouse=True)
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EIGENDECOMP_FIGURES", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1 / 3, 0.333333), (1234567.0, 1234570.0), (1234567, 1234567), (True, True), (None, None), ("a", "a"),
        (torch.tensor([[1.0, 2.0]]), [[1.0, 2.0]]), (torch.tensor(3), 3), (np.float64(0.1234567), 0.123457),
        (np.int64(3), 3), ((1, [2.0]), [1, [2.0]]),
        ({1: (2,), "b": {"c": torch.tensor(True)}}, {"1": [2], "b": {"c": True}}),
        ([], []), ({}, {}), (-0.0, 0.0), (1e-300, 1e-300),
    ],
)  # fmt: skip
def test_what_is_plain(value: Any, expected: Any) -> None:
    found = plain(value)
    assert found == expected and type(found) is type(expected)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor([1.0, math.nan]), {"a": [math.inf]}])
def test_what_is_not_finite_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"(nan|inf) is not a result that can be reported"):
        plain(value)


@pytest.mark.parametrize(("value", "kind"), [(object(), "object"), ({1, 2}, "set"), (1j, "complex")])
def test_what_json_has_no_word_for_is_refused(value: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} is not a result"):
        plain(value)


def test_a_name_is_recorded_once() -> None:
    results = Results("toy")
    results.record(a=1 / 3, b={"c": [1.0]})
    with pytest.raises(ValueError, match="toy: 'a' is recorded already"):
        results.record(a=2)
    assert results.values == {"a": 0.333333, "b": {"c": [1.0]}}


def test_what_is_recorded_stays_as_it_was() -> None:
    results, scores = Results("toy"), [1.0]
    results.record(scores=scores)
    scores.append(2.0)
    assert results.values == {"scores": [1.0]}


def test_what_is_written_says_where_it_was_computed(figures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    results = Results("toy", seeds=(0, 1))
    results.record(score=0.5)
    content = json.loads(results.write().read_text())
    assert (content["name"], content["settings"], content["results"]) == ("toy", {"seeds": [0, 1]}, {"score": 0.5})
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    assert content["versions"]["processor"]
    kernels = content["versions"]["kernels"]
    assert kernels["torch"] == torch.backends.cpu.get_cpu_capability() and kernels["MKL_CBWR"] == "COMPATIBLE"
    assert not (figures / "toy_claims.json").exists()


@pytest.mark.parametrize(
    ("quantity", "comparison", "bound", "verdict", "margin"),
    [
        (3.0, ">", 2.0, True, 2.0), (1.0, ">", 2.0, False, -2.0), (2.0, ">", 2.0, False, 0.0),
        (2.0, ">=", 2.0, True, 0.0), (1.0, "<", 2.0, True, 2.0),
        (2.0, "<=", 2.0, True, 0.0), (3.0, "<=", 2.0, False, -2.0),
        (3.0, "==", 2.0, False, -2.0),
    ],
)  # fmt: skip
def test_a_claims_verdict_and_margin(
    quantity: float, comparison: str, bound: float, verdict: bool, margin: float
) -> None:
    claim = Claim("name", "it is so", quantity, comparison, bound, spread=0.5)
    assert claim.verdict is verdict and claim.margin == margin
    assert Claim("name", "it is so", quantity, comparison, bound).margin is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((1.0, "!=", 2.0), "comparison='!=' must be one of < <= > >= =="),
        ((math.nan, "<", 2.0), "quantity=nan must be finite"),
        ((1.0, "<", math.inf), "bound=inf must be finite"),
        ((1.0, "<", 2.0, -0.1), "spread=-0.1 must not be negative"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(arguments: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Results("toy").claim("much", "it is much", *arguments)


def test_claims_are_written_beside_the_numbers(figures: Path) -> None:
    results = Results("toy")
    assert results.claim("more", "it is more", 3, ">", 2, spread=0.5, over="20 fits").verdict
    assert not results.claim("less", "it is less", torch.tensor(3.0).item(), "<", 2).verdict
    with pytest.raises(ValueError, match="toy: 'more' is claimed already"):
        results.claim("more", "it is more", 3, ">", 2)
    results.write()
    assert json.loads((figures / "toy_claims.json").read_text()) == [
        {"name": "more", "statement": "it is more", "quantity": 3.0, "comparison": ">", "bound": 2.0, "spread": 0.5,
         "over": "20 fits", "verdict": True, "margin": 2.0, "close": False},
        {"name": "less", "statement": "it is less", "quantity": 3.0, "comparison": "<", "bound": 2.0, "spread": 0.0,
         "over": "", "verdict": False, "margin": None, "close": False},
    ]  # fmt: skip
    Results("toy").write()
    assert not (figures / "toy_claims.json").exists()


def test_verdicts_show_whole_statements_margins_and_what_is_near_its_bound() -> None:
    results, long = Results("toy"), "a statement that is longer than the fifty characters at which pandas cuts a column"
    results.claim("clear", long, 3, ">", 2, spread=0.25, over="20 fits")
    results.claim("near", "barely", 3, ">", 2.9, spread=0.1)
    results.claim("not", "a < b & c", 1, ">", 2, spread=0.5)
    results.claim("alone", "one number", 1, "<=", 2)
    shown = results.verdicts()
    assert shown.frame().to_numpy().tolist() == [
        [long, "3", "> 2", "4.0", "20 fits", "holds"],
        ["barely", "3", "> 2.9", "1.0", "–", "holds, near its bound"],
        ["a < b & c", "1", "> 2", "-2.0", "–", "fails"],
        ["one number", "1", "<= 2", "–", "–", "holds"],
    ]
    html = shown._repr_html_()
    assert long in html and long in repr(shown) and "a &lt; b &amp; c" in html
