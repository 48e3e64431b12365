"""A story model written otherwise is the same function, with standard inputs of its weights."""

from typing import Any

import pytest
import torch

from eigendecomp.targets.stories import model as stories
from rooms.stories.standardised import activations, standardised


@pytest.fixture(scope="module")
def model() -> Any:
    return stories.load_model()


def test_standardised_is_the_same_function_with_standard_inputs(model: Any) -> None:
    tokens = stories.token_windows(stories.load_stories("validation")[:60], 60, 24)
    other = standardised(model, [2, 4], tokens)
    torch.testing.assert_close(other(tokens), model(tokens), rtol=1e-3, atol=1e-3)
    met: list[torch.Tensor] = []
    for point in ("ln1", "attn.hook_z", "ln2"):
        module = other.get_submodule(f"blocks.4.{point}")
        module.register_forward_hook(lambda _, __, x: met.append(x.detach().flatten(0, 1)))
    other(tokens)
    assert len(met) >= 3
    for x in met:
        assert x.mean(0).abs().max() < 1e-3 and (x.std(0) - 1).abs().max() < 1e-3


def test_activations_are_those_of_the_run(model: Any) -> None:
    tokens = stories.token_windows(stories.load_stories("validation")[:60], 300, 12)
    found = activations(model, tokens, ["blocks.4.hook_resid_post", "blocks.4.ln1"])
    _, cache = model.run_with_cache(tokens)
    expected = cache["blocks.4.hook_resid_post"].detach()
    torch.testing.assert_close(found["blocks.4.hook_resid_post"].view_as(expected), expected, rtol=1e-4, atol=1e-4)
    assert found["blocks.4.ln1"].shape == (3600, 64)
    assert not model.get_submodule("blocks.4.ln1")._forward_hooks
