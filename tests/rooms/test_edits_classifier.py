"""Edits of the classifier: what is scored, and how costs of edits are summarised."""

import math

import pandas as pd
import pytest
import torch

pytest.importorskip("sae_lens")

from eigendecomp.targets.fashion import network as cnn
from rooms.edits import classifier, summary


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the classifier


def test_the_head_with_standard_inputs_is_the_network() -> None:
    model = cnn.load_model()
    images = torch.rand(6, 1, 28, 28, generator=draw(2))
    x = classifier.pooled(model, images)
    mean, deviation = x.mean(0), x.std(0) + 0.1
    head = classifier.Head(model.head, mean, deviation)
    with torch.no_grad():
        torch.testing.assert_close(head((x - mean) / deviation), model(images), atol=1e-4, rtol=1e-4)


def test_a_confusion_is_where_the_network_leans_to_another_class() -> None:
    p = torch.full((3, 10), 0.05)
    p[0, 2], p[1, 2], p[2, 4] = 0.55, 0.3, 0.55
    labels = torch.tensor([4, 4, 4])
    told = {concept: torch.zeros(3, dtype=torch.bool) for _, concept in classifier.CONCEPTS.values()}
    found = classifier.behaviours(p, labels, told)["coat as pullover"]
    assert found.on.tolist() == [True, True, False] and found.members.nonzero().tolist() == [[2]]


# ---- summaries


def test_costs_are_paired_over_the_cases_that_both_reach() -> None:
    rows = pd.DataFrame([
        {"behaviour": b, "seed": s, "method": m, "damage": d, "worst": d, "seconds": 1.0, "bytes": 4, "examples": 10}
        for b, s, m, d in (
            ("a", 0, "one direction", 1.0), ("a", 0, "x", 2.0), ("b", 0, "one direction", 10.0), ("b", 0, "x", 20.0),
            ("c", 0, "one direction", 1e-3), ("c", 0, "x", None),
        )
    ])  # fmt: skip
    middle, low, high = summary.ratio(rows, "x", draws=50)
    assert all(math.isclose(value, math.log(2)) for value in (middle, low, high))
    table = summary.compared(rows, draws=50).set_index("method")
    assert table.loc["x", "reached"] == 2 and table.loc["x", "of"] == 3
    assert table.loc["one direction", "best_in"] == 3 and math.isclose(table.loc["x", "cost"], 2)
