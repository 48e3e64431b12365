"""The recurrent network: the bits it keeps, its equations, its truth, and what forgetting one bit is."""

import pytest
import torch

from eigendecomp.study import recovery
from eigendecomp.study.moves import displaced
from eigendecomp.targets.toys import recurrent
from eigendecomp.targets.toys.recurrent import FlipFlop
from rooms.sequences import forgetting


def untrained() -> FlipFlop:
    torch.manual_seed(0)
    return FlipFlop(units=5).double()


def writes(n: int, seed: int = 0) -> torch.Tensor:
    return recurrent.data(n, torch.Generator().manual_seed(seed)).double()


def test_memory_is_what_was_written_last() -> None:
    x = writes(20)
    kept = recurrent.memory(x)
    assert set(x.unique().tolist()) == {-1, 0, 1}
    for row in range(20):
        for bit in range(3):
            last = 0.0
            for t in range(recurrent.LENGTH):
                last = float(x[row, t, bit]) or last
                assert kept[row, t, bit] == last


def test_the_network_is_torchs_gated_recurrent_unit_with_the_other_name_of_its_gate() -> None:
    model, x = untrained(), writes(4)
    unit = torch.nn.GRU(3, 5, batch_first=True).double()
    with torch.no_grad():  # torch keeps z of the old state where this one takes z of the new
        mine, theirs = dict(model.named_parameters()), dict(unit.named_parameters())
        for part, name in (("write", "weight_ih_l0"), ("state", "weight_hh_l0"), ("write", "bias_ih_l0")):
            rows = [mine[f"{part}_{gate}.{name.split('_')[0]}"] for gate in "rzn"]
            theirs[name].copy_(torch.cat([rows[0], -rows[1], rows[2]]))
        theirs["bias_hh_l0"].zero_()
    torch.testing.assert_close(model.states(x), unit(x)[0])


def test_the_truth_is_the_gradient_of_the_bit_over_both_values_and_all_steps() -> None:
    model = untrained()
    truth = recurrent.truth(model)
    for bit in range(3):
        model.zero_grad()
        for value in (1.0, -1.0):
            x = torch.zeros(1, recurrent.LENGTH, 3, dtype=torch.double)
            x[0, 0, bit] = value
            for t in range(recurrent.LENGTH):
                (value * model(x[:, : t + 1])[0, t, bit]).backward()
        for name, p in model.named_parameters():
            if not name.startswith("read"):
                torch.testing.assert_close(truth.objects[name][bit], p.grad)
    names = [name for names in truth.layers.values() for name in names]
    assert sorted(names) == sorted(truth.objects) and set(truth.layers) == {"write", "state"}


def test_forgetting_counts_the_bit_apart_from_the_others() -> None:
    model, x = untrained(), writes(10)
    bit = 1
    others = torch.tensor([0, 2])
    with torch.no_grad():
        without = x.clone()
        without[..., bit] = 0
        on, off = model(x), model(without)
        row = -model.read.weight.detach() * torch.eye(3)[bit].double().unsqueeze(1)
    task = forgetting.Forgetting(model, x, bit)
    half = task.effect(displaced(model, {"read.weight": row}), 0.5)  # half of what the bit's output reads
    assert half.left == pytest.approx(0.25) and half.beside == 0
    bias = model.read.bias.detach()[bit]
    unit = sum(y[..., others].square().sum() for y in (on, off))
    assert half.elsewhere == pytest.approx(((off[..., bit] - bias).square().sum() / 4 / unit).item())
    still = task.effect(displaced(model, {"read.weight": row}), 0.0)
    assert (still.left, still.elsewhere) == (1, 0)


def test_the_own_share_of_a_change_of_one_output_is_whole_and_of_all_alike_a_third() -> None:
    model, x = untrained(), writes(10)
    one = displaced(model, {"read.bias": torch.eye(3)[1].double()})
    alike = displaced(model, {"read.bias": torch.ones(3).double()})
    assert forgetting.own_share(model, one, x, 1) == pytest.approx(1)
    assert forgetting.own_share(model, one, x, 0) == 0
    assert forgetting.own_share(model, alike, x, 2) == pytest.approx(1 / 3)


def test_training_learns_and_the_seed_decides_it_and_a_fit_is_scored() -> None:
    model, missed = recurrent.train(seed=3, steps=60, units=8)
    again, same = recurrent.train(seed=3, steps=60, units=8)
    other, _ = recurrent.train(seed=4, steps=60, units=8)
    assert missed == same < 0.9
    assert torch.equal(model.read.weight, again.read.weight) and not torch.equal(model.read.weight, other.read.weight)
    d = forgetting.fit(model, seed=0, steps=4, sequences=30)
    assert not any(name.startswith("read") for name in d.target.names)
    truth = forgetting.truth(model)
    scores = recovery.recovery(d, truth)
    assert scores.features == 3 and set(scores.mean_cosine) == {"write", "state"}
    assert set(scores.acted) == {"left", "elsewhere"} and scores.row()["left"] == scores.acted["left"] <= 1.01
    impact = d.impact(recurrent.alone().flatten(0, 1)).unflatten(0, (3, 2 * recurrent.LENGTH))
    torch.testing.assert_close(recovery.strength(d, truth), impact.mean(1))
    writes_only = forgetting.fit(model, seed=0, steps=2, parameters=("write_*",), sequences=30)
    assert all(name.startswith("write") for name in writes_only.target.names)


def test_a_bit_whose_reading_is_taken_away_is_gone_and_one_that_is_not_moved_stays() -> None:
    model = untrained()
    truth = forgetting.truth(model)
    assert truth.acted is not None
    row = -model.read.weight.detach() * torch.eye(3)[1].double().unsqueeze(1)
    gone = truth.acted(displaced(model, {"read.weight": row}), 1)
    assert gone["left"] < 0.1  # what the bias adds counts as elsewhere and holds the step back
    still = truth.acted(displaced(model, {"read.weight": 0 * row}), 1)
    assert still == {"left": 1, "elsewhere": 0}
