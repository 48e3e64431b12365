"""Concept resolution against scikit-learn and on planted units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from eigendecomp.study.concepts import average_precision, oriented, paired, purity, resolve


@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_agrees_with_scikit_learn_also_on_ties(n, v, m, levels, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (n, v), generator=draw).float()
    concepts = torch.rand(n, m, generator=draw) < 0.3
    concepts[0] = True
    found = average_precision(scores, concepts)
    for i in range(v):
        for j in range(m):
            assert found[i, j] == pytest.approx(average_precision_score(concepts[:, j], scores[:, i]), abs=1e-5)


def test_order_of_samples_does_not_matter():
    draw = torch.Generator().manual_seed(0)
    scores, concepts = torch.rand(50, 3, generator=draw).round(decimals=1), torch.rand(50, 2, generator=draw) < 0.4
    order = torch.randperm(50, generator=draw)
    torch.testing.assert_close(average_precision(scores[order], concepts[order]), average_precision(scores, concepts))


def planted(n=400, seed=0):
    """Five units of noise, of which unit 3 reads concept 0, and units 1 and 4 read concept 1 together."""
    draw = torch.Generator().manual_seed(seed)
    concepts = torch.rand(n, 2, generator=draw) < 0.3
    scores = torch.randn(n, 6, generator=draw)
    scores[:, 3] = 4 * concepts[:, 0] + 0.1 * torch.randn(n, generator=draw)
    noise = torch.randn(n, generator=draw) * 3
    scores[:, 1], scores[:, 4] = concepts[:, 1].float() + noise, concepts[:, 1].float() - noise
    return scores, concepts


def test_finds_the_unit_and_the_team():
    found = resolve(planted(seed=0), planted(seed=1))
    assert found.unit[0] == 3 and found.single[0] == pytest.approx(1)
    assert found.single[1] < 0.7 and found.team[1] == pytest.approx(1, abs=1e-3)


def test_units_are_chosen_on_the_other_split():
    chosen, (scores, concepts) = planted(seed=0), planted(seed=1)
    cheat = scores.clone()
    cheat[:, 5] = concepts[:, 1]  # perfect, but only where it is scored
    assert resolve(chosen, (cheat, concepts)).unit[1] != 5


def test_scale_of_units_does_not_matter():
    a, b = planted(seed=0), planted(seed=1)
    scale = torch.tensor([1e-3, 1.0, 1e3, 7.0, 1e-2, 1.0])
    scaled = resolve((a[0] * scale, a[1]), (b[0] * scale, b[1]))
    torch.testing.assert_close(scaled.team, resolve(a, b).team, atol=1e-4, rtol=0)


def test_orientation_follows_the_heavier_tail():
    scores = torch.tensor([[-5.0, 1.0], [1.0, -0.1], [1.0, 0.0]])
    assert oriented(scores)[0].tolist() == [5.0, 1.0]
    assert oriented(-scores)[0].tolist() == [5.0, 1.0]
    assert oriented(scores, on=-scores)[0].tolist() == [-5.0, -1.0]


def test_bad_input():
    with pytest.raises(ValueError, match="concept 1 is true of no sample"):
        average_precision(torch.rand(3, 2), torch.tensor([[True, False]] * 3))
    with pytest.raises(ValueError, match="unit 1 are not all numbers"):
        average_precision(torch.tensor([[0.0, 1.0], [1.0, torch.nan]]), torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="3 scored samples, but 2"):
        average_precision(torch.rand(3, 2), torch.ones(2, 1, dtype=torch.bool))


def test_purity_is_the_share_of_the_strongest_samples_of_one_rare_concept():
    concepts = torch.zeros(100, 3, dtype=torch.bool)
    concepts[:4, 0], concepts[4:6, 1], concepts[:, 2] = True, True, True
    scores = torch.zeros(100, 3)
    scores[:4, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])  # the concept, and then off
    scores[2:6, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0])  # half one concept, half the other
    assert purity(scores, concepts, top=4).tolist() == [1.0, 0.5, 0.0]
    assert purity(scores, concepts, top=8).tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="more than 5%"):
        purity(scores, concepts[:, 2:])


def test_a_difference_on_the_same_concepts_and_its_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(1, 60, generator=generator)  # what both find hard cancels
    mine = hard + 0.05 + 0.01 * torch.randn(3, 60, generator=generator)
    theirs = hard + 0.01 * torch.randn(3, 60, generator=generator)
    gap = paired(mine, theirs)
    assert gap.mean == pytest.approx((mine.mean() - theirs.mean()).item())
    assert gap.low < gap.mean < gap.high and gap.low > 0.04 and gap.high < 0.06
    none = paired(theirs, theirs)
    assert none.mean == 0 and none.low <= 0 <= none.high
    one = paired(mine[:1], theirs)  # seeds may differ in number
    assert one.error > 0


def test_seeds_that_differ_widen_the_interval() -> None:
    flat = torch.full((4, 30), 0.5)
    apart = flat + torch.tensor([-0.1, -0.05, 0.05, 0.1]).unsqueeze(1)
    assert paired(apart, flat).error > 0.02 > paired(flat, flat).error
