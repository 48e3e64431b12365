"""A story model written so that what arrives at its weights has mean 0 and deviation 1, and what arrives there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


@torch.no_grad()
def standardised(model: HookedTransformer, layers: Sequence[int], tokens: Int[Tensor, "n t"]) -> HookedTransformer:
    """The same function with some blocks' weights written so that their inputs have mean 0 and deviation 1.

    A gradient of a weight is an outer product with what arrives there, so it depends on how the layer is written: a
    mean that all tokens share is in every gradient, and large entries count for more than small ones. Means and
    deviations over ``tokens`` are moved from the weights of the query, key, value, output and first MLP maps into the
    normalisations' scales and shifts, and biases. (What arrives at the second MLP map cannot be shifted so.)
    """
    names = [f"blocks.{layer}.{point}" for layer in layers for point in ("ln1", "ln2", "attn.hook_z")]
    moments = {name: (x.mean(0), x.std(0)) for name, x in activations(model, tokens, names).items()}
    other = copy.deepcopy(model)
    for layer in layers:
        block = cast(Any, other.blocks[layer])
        attn, mlp = block.attn, block.mlp
        mean, scale = moments[f"blocks.{layer}.ln1"]
        for letter in "QKV":
            weight = getattr(attn, f"W_{letter}")
            getattr(attn, f"b_{letter}").add_(torch.einsum("d,hde->he", mean, weight))
            weight.mul_(scale[None, :, None])
        _rescale(block.ln1.w, block.ln1.b, mean, scale)
        mean, scale = moments[f"blocks.{layer}.attn.hook_z"]  # attention's rows sum to one: values shift alike
        attn.b_O.add_(torch.einsum("he,hed->d", mean, attn.W_O))
        attn.W_O.mul_(scale.unsqueeze(-1))
        attn.W_V.div_(scale.unsqueeze(1))
        attn.b_V.sub_(mean).div_(scale)
        mean, scale = moments[f"blocks.{layer}.ln2"]
        mlp.b_in.add_(mean @ mlp.W_in)
        mlp.W_in.mul_(scale.unsqueeze(1))
        _rescale(block.ln2.w, block.ln2.b, mean, scale)
    return other


@torch.no_grad()
def activations(model: HookedTransformer, tokens: Int[Tensor, "n t"], modules: Sequence[str]) -> dict[str, Tensor]:
    """What some modules give at every position: {module: (n · t, …)}, window by window; of several calls the last."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    met: dict[str, Tensor] = {}

    def remember(name: str, _module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        met[name] = output.flatten(0, 1)

    hooks = [model.get_submodule(name).register_forward_hook(partial(remember, name)) for name in modules]
    try:
        for windows in tokens.split(256):
            model(windows, return_type=None)
            for name, pieces in outputs.items():
                pieces.append(met[name])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(pieces) for name, pieces in outputs.items()}


def _rescale(w: Tensor, b: Tensor, mean: Tensor, scale: Tensor) -> None:
    w.div_(scale)
    b.sub_(mean).div_(scale)
