"""Directions as an adapter that peft reads: low-rank changes of weights need no file of the size of the model."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions
from eigendecomp.support import files

Layer = nn.Linear | nn.Conv2d | nn.Embedding | nn.Module  # the last one is transformers' Conv1D, which may be missing


@dataclass(frozen=True)
class Change:
    """ΔW = B A of one module's weight, under peft's names."""

    module: str
    b: Float[Tensor, "out r"]
    a: Float[Tensor, "r in"]
    names: tuple[str, str]  # of A and B
    window: tuple[int, ...]  # a convolution's, over which A goes as well

    def tensors(self) -> dict[str, Tensor]:
        ones, (first, second) = (1,) * len(self.window), self.names
        a = self.a.reshape(len(self.a), -1, *self.window)
        b = self.b.reshape(*self.b.shape, *ones)
        return {f"base_model.model.{self.module}.{first}": a, f"base_model.model.{self.module}.{second}": b}


def to_lora(d: Decomposition, steps: Mapping[int, float], path: str | Path) -> Path:
    """Write a folder that ``peft.PeftModel.from_pretrained(model, path)`` reads; merged, it is :func:`edited`.

    Weights of Linear, transformers' Conv1D, Conv2d and Embedding can be written, at rank directions × rank.

    Raises:
        ValueError: if there is no step, or a chosen parameter is one that an adapter cannot change.
    """
    if not steps:
        raise ValueError(f"steps={dict(steps)!r} moves nothing; give {{direction: step}}")
    few, sizes = d.moving(steps)
    folder = files.folder(path)
    layers = {name: layer_of(d.target.model, name) for name in d.decoder.shapes}
    changes = [change(few, name, layer, sizes) for name, layer in layers.items()]
    held = {name: tensor for one in changes for name, tensor in one.tensors().items()}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}, {"format": "pt"})
    folder.mkdir(exist_ok=True)
    files.replace(folder / "adapter_model.safetensors", content)
    files.replace(folder / "adapter_config.json", json.dumps(config(d.target.model, changes), indent=2).encode())
    return folder


def layer_of(model: nn.Module, name: str) -> Layer:
    """The module whose weight the parameter is; ValueError if an adapter cannot change it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    reason = refusal(model, module, path, leaf)
    if reason:
        raise ValueError(
            f"parameter {name!r} {reason}, which an adapter cannot change; decompose others with parameters=[...], "
            "or take d.edit(steps), which edits every parameter"
        )
    return module


def refusal(model: nn.Module, module: nn.Module, path: str, leaf: str) -> str | None:
    """Why an adapter would not do to this parameter what the edit does; None if it would."""
    plain = isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)) or is_conv1d(module)
    if not plain or leaf != "weight" or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"is the {leaf} of a {type(module).__name__}, not the weight of a Linear, Conv1D, Conv2d or Embedding"
    if not path:
        return "belongs to the model itself, not to a module inside it"
    if isinstance(module, nn.Conv2d) and (module.groups, module.dilation, module.padding_mode) != (1, (1, 1), "zeros"):
        return "is of a Conv2d with groups, dilation or padding other than zeros"
    weight = module.get_parameter("weight")
    owners = [p for other in model.modules() for p in other._parameters.values() if p is weight]
    return None if len(owners) == 1 else "is shared by several modules"


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a Linear whose weight is (in, out); transformers is not imported for it."""
    return any(f"{c.__module__}.{c.__name__}" == "transformers.pytorch_utils.Conv1D" for c in type(module).__mro__)


def change(few: Directions, name: str, layer: Layer, sizes: Float[Tensor, " v"]) -> Change:
    """The sum over directions of δ u for one weight, its terms side by side."""
    left, right = few.pair(name, [0])
    left, right = (left * sizes[:, None, None]).flatten(0, 1), right.flatten(0, 1)
    turned = isinstance(layer, nn.Embedding) or is_conv1d(layer)  # their weights are (in, out)
    b, a = (right.T, left) if turned else (left.T, right)
    names = ("lora_A.weight", "lora_B.weight")
    if isinstance(layer, nn.Embedding):
        names = ("lora_embedding_A", "lora_embedding_B")
    window = tuple(few.shapes[name][2:])
    return Change(name.rpartition(".")[0], b, a, names, window)


def config(model: nn.Module, changes: Sequence[Change]) -> dict[str, Any]:
    """adapter_config.json: α = r everywhere, so that nothing is scaled."""
    ranks = {f"^{re.escape(one.module)}": len(one.a) for one in changes}
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "target_modules": targets(model, [one.module for one in changes]),
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(is_conv1d(model.get_submodule(one.module)) for one in changes),
        "inference_mode": True,
    }


def targets(model: nn.Module, modules: Sequence[str]) -> list[str] | str:
    """The modules' names; peft takes those that end alike as well, and where there are such, an expression."""
    others = {name for name, _ in model.named_modules()} - set(modules)
    if any(other.endswith(f".{name}") for other in others for name in modules):
        return "|".join(re.escape(name) for name in modules)
    return list(modules)
