"""Residual networks as chains: the same function as in `layers`, and scores that the truth itself passes."""

import pytest
import torch

from rooms.peers import residual


def network() -> residual.Residual:
    model = residual.Residual(6, 5, 2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) / 2)
    return model


def test_the_chain_is_the_network_of_layers() -> None:
    model, x = network(), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), residual.source(model)(x))


def test_the_truth_recovers_itself() -> None:
    model = network()
    objects = residual.source(model).truth().objects
    rows = torch.cat([objects[residual.theirs(name)].mT.flatten(1) for name, _ in model.named_parameters()], 1)
    found = residual.recovered(model, rows, torch.eye(6))
    assert found.owned == 6 and min(found.least_cosine.values()) == pytest.approx(1)


def test_weights_split_by_feature_give_the_contributions_and_weights_that_are_whole_do_not() -> None:
    model, eye = network(), torch.eye(6)
    split = {
        name: torch.einsum("fi,io->fio", eye, w) if "in" in name else w[None] for name, w in model.named_parameters()
    }
    split = {name: part.detach() for name, part in split.items()}
    assert residual.contributions(model, split).min() == pytest.approx(1)
    assert residual.own_cosines(split, dict(model.named_parameters())).min() == pytest.approx(1)
    merged = {name: part[:1] + part[1:2] if "in" in name else part for name, part in split.items()}
    assert residual.contributions(model, merged)[2:].max() == 0


def test_importances_are_right_where_each_feature_has_one_reader_and_each_neuron_writes() -> None:
    on = torch.ones(6, 5)
    ci = {"W_in_0": torch.eye(6), "W_out_0": on, "W_in_1": torch.eye(6), "W_out_1": on}
    assert residual.importances(ci, 5, 0.2) == {"identity_error": 0, "dense_error": 0}
    wrong = {**ci, "W_in_1": torch.ones(6, 6), "W_out_1": 0 * on}
    assert residual.importances(wrong, 5, 0.2) == {"identity_error": 30, "dense_error": 5}
