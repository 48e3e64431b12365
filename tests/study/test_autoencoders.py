"""The adapter to sae-lens: it trains offline from a seed, and steering does what it says."""

import pytest
import torch
from torch import nn

pytest.importorskip("sae_lens")
from eigendecomp.study import autoencoders


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    """Six sparse features on orthogonal axes."""
    draw = torch.Generator().manual_seed(0)
    on = torch.rand(2000, 6, generator=draw) < 0.15
    return on * (0.5 + torch.rand(2000, 6, generator=draw))


@pytest.fixture(scope="module")
def trained(activations: torch.Tensor) -> autoencoders.Autoencoder:
    return autoencoders.train(activations, 6, 1.0, seed=0, steps=600, batch_size=256, learning_rate=1e-2)


def test_it_finds_planted_features(activations, trained) -> None:
    cosine = torch.nn.functional.normalize(trained.decoder, dim=1).abs().amax(0)
    assert cosine.min() > 0.95
    assert trained.reconstruction_error(activations) < 0.15
    assert 0.5 < (trained.encode(activations) != 0).sum(1).double().mean() < 1.5


def test_one_seed_gives_one_autoencoder_and_leaves_the_global_state(activations) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = (
        autoencoders.train(activations, 6, 2, seed=seed, kind="topk", steps=5, batch_size=64) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.decoder, second.decoder)
    assert not torch.equal(first.decoder, other.decoder)
    assert ((first.encode(activations) != 0).sum(1) <= 2).all()


def test_it_trains_where_gradients_are_off(activations) -> None:
    with torch.no_grad():
        autoencoders.train(activations, 6, 1.0, seed=0, steps=2, batch_size=64)


def test_steering_adds_the_unit_everywhere_or_where_it_is_on(activations, trained) -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(6))  # type: ignore[union-attr]
        before = model(activations)
        with trained.steered(model, "0", {2: 0.5}):
            added = model(activations) - before
        with trained.steered(model, "0", {2: -1.0}, how="scale"):
            scaled = model(activations) - before
        assert torch.equal(model(activations), before)
    torch.testing.assert_close(added, (0.5 * trained.decoder[2]).expand(2000, 6), atol=1e-5, rtol=1e-4)
    z = trained.encode(activations)[:, 2]
    torch.testing.assert_close(scaled, -z[:, None] * trained.decoder[2], atol=1e-5, rtol=1e-4)


def test_steering_a_convolution_goes_along_its_channels(trained) -> None:
    model, x = nn.Sequential(nn.Identity()), torch.rand(3, 6, 4, 5, generator=torch.Generator().manual_seed(1))
    for how in ("add", "scale"):
        with trained.steered(model, "0", {1: 0.5}, how=how):
            last = model(x.movedim(1, -1)).movedim(-1, 1)
        with trained.steered(model, "0", {1: 0.5}, how=how, axis=1):
            torch.testing.assert_close(model(x), last)
        assert not torch.allclose(last, x)


def test_before_the_threshold_units_read_what_they_keep(activations, trained) -> None:
    before, after = trained.before_threshold(activations), trained.encode(activations)
    torch.testing.assert_close(before[after > 0], after[after > 0], atol=1e-4, rtol=1e-4)
    assert before[after > 0].min() > 0 and before.unique().numel() > after.unique().numel()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kept": 0.0}, "kept=0.0"),
        ({"kept": 7.0}, "at most units=6"),
        ({"kept": 1.5, "kind": "topk"}, "whole"),
        ({"kind": "vanilla"}, "kind='vanilla'"),
    ],
)
def test_refusals(activations, change, words) -> None:
    with pytest.raises(ValueError, match=words):
        autoencoders.train(activations, 6, **{"kept": 1.0, "seed": 0, **change})
    with pytest.raises(ValueError, match="finite rows"):
        autoencoders.train(activations * float("nan"), 6, 1.0, seed=0)
