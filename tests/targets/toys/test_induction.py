"""The induction circuit: its data, the scores of its path against a circuit built by hand, its truth, its removal."""

import pytest
import torch

import eigendecomp as ed
from eigendecomp.study import recovery
from eigendecomp.study.moves import displaced
from eigendecomp.targets.toys import induction
from eigendecomp.targets.toys.induction import Induction, Sequences
from rooms import switches
from rooms.sequences import removal

V, T = induction.VOCABULARY, induction.LENGTH


def sequences(n: int = 30, seed: int = 0) -> Sequences:
    return induction.data(n, torch.Generator().manual_seed(seed))


def untrained() -> Induction:
    torch.manual_seed(0)
    model = Induction(width=12, size=5).double()
    torch.nn.init.normal_(model.W_P, std=0.5)
    return model


def built(sharp: float = 400.0) -> Induction:
    """A circuit by hand: a token's and a position's one-hot, and room for the previous token and for the answer."""
    model = Induction(width=3 * V + T, size=max(V, T))
    here, place, previous, answer = (
        slice(a, b) for a, b in ((0, V), (V, V + T), (V + T, 2 * V + T), (2 * V + T, None))
    )
    first, second = model.heads
    assert isinstance(first, induction.Head) and isinstance(second, induction.Head)
    eye = torch.eye(V)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.W_E.weight[:, here] = eye
        model.W_P[:, place] = torch.eye(T)
        first.W_Q.weight[: T - 1, place] = sharp * torch.eye(T)[1:]  # position t asks for t − 1
        first.W_K.weight[:T, place] = torch.eye(T)
        first.W_V.weight[:V, here] = eye
        first.W_O.weight[previous, :V] = eye
        second.W_Q.weight[:V, here] = sharp * eye  # a token asks for places whose previous token is the same
        second.W_K.weight[:V, previous] = eye
        second.W_K.weight[:V, V] = -1  # the first position copies itself, having none before it
        second.W_V.weight[:V, here] = eye
        second.W_O.weight[answer, :V] = eye
        model.W_U.weight[:, answer] = 20 * eye
    return model


def test_sequences_repeat_their_block_and_half_of_it_follows_bigrams() -> None:
    q = sequences(2000)
    for row, period in zip(q.tokens[:50], q.period[:50], strict=True):
        assert torch.equal(row[period:], row[:-period])
    first = torch.arange(1, T + 1) < q.period.unsqueeze(1)
    share = (q.targets == induction.successor(q.inputs))[first].double().mean().item()
    assert share == pytest.approx(0.5 + 0.5 / V, abs=0.02)


def test_samples_are_those_that_only_one_of_the_two_can_answer() -> None:
    q = sequences()
    found = q.samples()
    for row, tokens in enumerate(q.tokens.tolist()):
        period = int(q.period[row])
        for t in range(T):
            before, block = tokens[:t], tokens[:period]
            assert bool(found["bigrams"][row, t]) == (tokens[t] not in before)
            unique = t >= period and block.count(tokens[t]) == 1
            assert bool(found["induction"][row, t]) == (unique and tokens[t + 1] != (tokens[t] + 1) % V)
            if found["induction"][row, t]:
                assert tokens[t + 1] == tokens[before.index(tokens[t]) + 1]


def test_a_circuit_built_by_hand_has_the_scores_of_its_path_and_says_what_is_repeated() -> None:
    model, q = built(), sequences()
    scores = removal.path_scores(model, q)
    assert scores["previous"][0] == pytest.approx(1, abs=1e-3)
    assert scores["induction"][1] == pytest.approx(1, abs=1e-3)
    assert scores["previous"][1] < 0.5 and scores["induction"][0] < 0.5
    assert induction.said(model, q)["induction"] == pytest.approx(1, abs=1e-3)
    with torch.no_grad():  # without copies of the previous token nothing can be looked for
        dict(model.named_parameters())["heads.0.W_O.weight"].zero_()
    assert removal.path_scores(model, q)["induction"][1] < 0.5
    assert induction.said(model, q)["induction"] < 0.5


def test_attention_looks_at_no_later_place() -> None:
    model, q = untrained(), sequences(4)
    for pattern in model.patterns(q.inputs):
        torch.testing.assert_close(pattern.sum(2), torch.ones_like(pattern[..., 0]))
        assert (pattern.triu(1) == 0).all()
    changed = q.inputs.clone()
    changed[:, 10:] = (changed[:, 10:] + 5) % V
    torch.testing.assert_close(model(changed)[:, :10], model(q.inputs)[:, :10])


def test_the_truth_is_the_gradient_of_what_each_feature_says_sample_by_sample() -> None:
    model, q = untrained(), sequences(6)
    truth = induction.truth(model, q)
    for feature, name in enumerate(induction.FEATURES):
        total, count = None, 0
        for n, t in q.samples()[name].nonzero().tolist():
            says = q.tokens[n, t + 1] if name == "induction" else (q.tokens[n, t] + 1) % V
            model.zero_grad()
            f = model(q.inputs[n : n + 1, : t + 1])[0, t]
            (f[says] - f.mean()).backward()
            grads = {
                k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None and k in truth.objects
            }
            total = grads if total is None else {k: total[k] + g for k, g in grads.items()}
            count += 1
        assert total is not None and set(total) == set(truth.objects)
        for key, value in total.items():
            torch.testing.assert_close(truth.objects[key][feature], value / count)
    assert list(truth.layers) == ["head 1", "head 2"]


def test_removal_is_none_without_a_step_and_whole_without_the_second_head() -> None:
    model = built()
    task = removal.Removal(model, sequences())
    name = "heads.1.W_O.weight"
    move = displaced(model, {name: -dict(model.named_parameters())[name].detach().clone()})
    still = task.effect(move, 0.0)
    assert (still.left, still.elsewhere, still.beside) == (1, 0, 0)
    gone = task.effect(move, 1.0)
    assert gone.left < 0.05  # what is left is that of one in all tokens
    assert switches.search(lambda step: task.effect(move, step), 1.2).left < 0.2


def test_training_learns_and_the_seed_decides_it_and_a_fit_has_strengths_of_both_features() -> None:
    few = {"steps": 100, "batch_size": 16, "width": 16, "size": 16}
    model, said = induction.train(seed=3, **few)
    again, same = induction.train(seed=3, **few)
    assert said == same and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, _ = induction.train(seed=4, **few)
    assert not torch.equal(model.W_U.weight, other.W_U.weight)
    assert said["bigrams"] > 2 / V
    q = sequences(8)
    d = removal.fit(model, seed=0, steps=4, sequences=20)
    assert isinstance(d, ed.Decomposition) and set(d.target.names) == set(induction.truth(model, q).objects)
    truth = removal.truth(model, q)
    strength = recovery.strength(d, truth, 1)
    one = d.impact(q.inputs, 1).unflatten(0, (8, T))
    torch.testing.assert_close(strength[1], one[q.samples()["bigrams"]].mean(0))
    scores = recovery.recovery(d, truth)
    assert scores.features == 2 and set(scores.mean_cosine) == {"head 1", "head 2"}
    assert scores.row()["previous"] == scores.acted["previous"]
    assert set(removal.fit(model, seed=0, steps=2, heads=(1,), sequences=20).target.names) == set(
        induction.HEADS["head 2"]
    )


def test_the_path_of_a_circuit_built_by_hand_is_broken_where_its_second_head_asks_for_nothing() -> None:
    model = built()
    truth = removal.truth(model, sequences())
    assert truth.acted is not None and truth.acted(displaced(model, {}), 1) == {}  # bigrams are to stay
    name = "heads.1.W_Q.weight"
    scores = truth.acted(displaced(model, {name: -dict(model.named_parameters())[name].detach() / 6}), 0)
    assert scores["previous"] == pytest.approx(1, abs=1e-3) and scores["copies"] == pytest.approx(1, abs=1e-3)
    assert scores["previous moved"] == scores["previous"] and scores["copies moved"] < 0.5 and scores["left"] < 0.3
    still = truth.acted(displaced(model, {}), 0)
    assert still["copies moved"] == still["copies"] and still["left"] == 1 and still["elsewhere"] == 0
