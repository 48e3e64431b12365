"""A feature of a residual network switched off: what each method may move, and what is told of it."""

import pytest
import torch

from eigendecomp.targets.toys import resid_mlp
from rooms import fitting
from rooms.layers import switching
from rooms.layers.switching import Off


@pytest.fixture(scope="module")
def off() -> Off:
    model, _ = resid_mlp.train(2, "identity", seed=0, features=20, neurons=6, steps=600, batch_size=128)
    d = fitting.fit(model, 30, seed=0, steps=150)
    x = resid_mlp.data(800, 20, torch.Generator().manual_seed(0))
    return Off(model, d, x, switching.sites(model, x, 20, [2.0], seed=0, steps=20))


def changed(off: Off, move: switching.Move) -> set[str]:
    before = {name: p.detach().clone() for name, p in off.model.named_parameters()}
    with move(0.5) as moved:
        return {name for name, p in moved.named_parameters() if not torch.equal(p, before[name])}


def test_methods_move_what_they_say(off: Off) -> None:
    feature = int((off.owner >= 0).nonzero()[0])
    moves = off.moves(feature)
    names = [name for name, _ in off.model.named_parameters()]
    assert changed(off, moves["direction"][0][0]) == set(names)
    assert changed(off, moves["its readers"][0][0]) == {name for name in names if "W_in" in name}
    single = [changed(off, move) for move, *_ in moves["one layer of it"]]
    assert single == [set(names[:2]), set(names[2:]), {names[0]}, {names[2]}]
    for move, *_ in moves["neuron"]:
        (name,) = changed(off, move)
        assert "W_out" in name
    assert all(not changed(off, move) for move, *_ in moves["autoencoder"])  # it acts on activations


def test_activations_are_those_after_the_relu(off: Off) -> None:
    _, w_in, w_out = off.model.weights[0]
    h = torch.relu(off.data @ w_in.T)
    torch.testing.assert_close(switching.hidden(off.model, 0, off.data), h)
    second = torch.relu((off.data + h @ w_out.T) @ off.model.weights[1][1].T)
    torch.testing.assert_close(switching.hidden(off.model, 1, off.data), second)


def test_rows_tell_the_best_of_each_method_and_the_network_is_as_it_was(off: Off) -> None:
    before = [p.detach().clone() for p in off.model.parameters()]
    rows = list(off.rows(2))
    assert [row["method"] for row in rows[:3]] == ["direction", "its readers", "one layer of it"]
    assert len({row["feature"] for row in rows}) == 2
    assert all(row["left"] + row["elsewhere"] <= 1 + 1e-5 for row in rows if row["method"] != "autoencoder")
    assert min(row["left"] for row in rows if row["method"] == "direction") < 0.3
    assert all(torch.equal(a, b) for a, b in zip(before, off.model.parameters(), strict=True))
