"""A device that is pretended: tensors on the CPU that count as on a GPU and refuse to meet others.

What would fail on a GPU fails here, on a machine without one. A tensor's device is kept by its memory: memory made from
tensors on the device is on the device, and so is what is asked for with ``device=``. As on a GPU, numbers (tensors
without axes) and the positions of an index may lie on the CPU, and ``to``, ``cpu`` and ``copy_`` move tensors.
"""

import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
MOVES = ("aten::copy_", "aten::_to_copy", "aten::lift_fresh", "aten::_local_scalar_dense")


class Pretended:
    """Inside, there is a GPU. ``fetched`` lists the shapes of tensors with axes that were moved off it.

    ``waits`` lists the lines of the package at which the host would wait for the device.

    Args:
        modes: dispatch modes whose own code must see the device too.
    """

    def __init__(self, *modes: type[TorchDispatchMode]) -> None:
        self.memory: dict[int, StorageWeakRef] = {}
        self.fetched: list[tuple[int, ...]] = []
        self.waits: list[str] = []
        self.modes = ExitStack()
        self.others = modes
        self.asked = False  # whether the function of torch that runs was given a tensor on the device

    def __enter__(self) -> Self:
        for mode in self.others:
            self.modes.enter_context(patch.object(mode, "__torch_dispatch__", self._within(mode.__torch_dispatch__)))
        self.modes.enter_context(_Dispatched(self))
        self.modes.enter_context(_Called(self))
        return self

    def __exit__(self, *error: object) -> None:
        self.modes.close()

    def _within(self, dispatch: Any) -> Any:
        """A mode's handling of an operation, during which torch has switched off what was asked from Python."""

        def dispatched(mode: Any, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            with _Called(self):
                return dispatch(mode, func, types, args, kwargs)

        return dispatched

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        with torch._C.DisableTorchFunction():
            functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 (which has no stubs)
            while functorch.is_functorch_wrapped_tensor(tensor):
                tensor = functorch.get_unwrapped(tensor)
            kept = self.memory.get(tensor.untyped_storage()._cdata)
            return kept is not None and not kept.expired()

    def put(self, tensor: Tensor) -> Tensor:
        """Declare a tensor's memory to be on the device."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self.memory[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def wait(self) -> None:
        """Remember the line of the package that makes the host wait."""
        lines = [frame for frame in traceback.extract_stack() if "/eigendecomp/" in frame.filename]
        self.waits += [f"{Path(lines[-1].filename).name}: {lines[-1].line}"] if lines else []

    def move(self, model: nn.Module) -> nn.Module:
        """Put a model's parameters and buffers on the device."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.put(tensor)
        return model

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor on a device: itself if it is there, or else a copy."""
        if self.holds(tensor) == (device.type == GPU.type):
            return tensor
        if self.holds(tensor) and tensor.ndim > 0:
            self.fetched.append(tuple(tensor.shape))
            self.wait()
        with torch.enable_grad() if tensor.requires_grad else torch.no_grad():
            copy = tensor.clone()
        if device.type == GPU.type:
            return self.put(copy)
        with torch._C.DisableTorchFunction():
            self.memory.pop(copy.untyped_storage()._cdata, None)
        return copy


class _Dispatched(TorchDispatchMode):
    """Every operation: refused where devices meet, and what it makes is where its arguments are."""

    def __init__(self, device: Pretended) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in given if self.device.holds(tensor)]
        name = func._schema.name
        if here and name not in MOVES:
            may_differ = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put")
            others = [tensor for tensor in given if tensor.ndim > 0 and not self.device.holds(tensor)]
            if others and not (may_differ and self.device.holds(args[0])):
                shapes = [tuple(tensor.shape) for tensor in given]
                raise RuntimeError(f"expected all tensors to be on the same device: {name} of shapes {shapes}")
        masks = tree_leaves(args[1]) if name in ("aten::index", "aten::index_put_") else []
        if here and (name in WAITS or any(x is not None and x.dtype == torch.bool for x in masks)):
            self.device.wait()
        result = func(*args, **(kwargs or {}))
        made = not given or name == "aten::lift_fresh"  # by a function of torch, beside what it was given
        if (here or (made and self.device.asked)) and not (name == "aten::copy_" and not self.device.holds(args[0])):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.device.put(leaf)
        return result


class _Called(TorchFunctionMode):
    """What says or asks where a tensor is."""

    def __init__(self, device: Pretended) -> None:
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if self.device.holds(args[0]) else CPU
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.device.holds(args[0])
        if name == "numpy" and self.device.holds(args[0]):
            raise TypeError("can't convert a tensor on the device to numpy; use Tensor.cpu()")
        if name in ("cpu", "to"):
            asked = [leaf for leaf in (*args[1:], *kwargs.values()) if isinstance(leaf, (torch.device, Tensor, str))]
            place = CPU if name == "cpu" else GPU if self.device.holds(args[0]) else CPU
            for leaf in asked:
                if isinstance(leaf, Tensor):
                    place = GPU if self.device.holds(leaf) else CPU
                else:
                    place = torch.device(leaf)
            args = tree_map(_real, args)
            kwargs = dict(tree_map(_real, kwargs))
            moved = self.device.moved(args[0], place)
            return moved if name == "cpu" else func(moved, *args[1:], **kwargs)
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = _real(torch.device(wanted))
        before = self.device.asked
        given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.device.asked = before or any(self.device.holds(leaf) for leaf in given)
        try:
            result = func(*args, **kwargs)
        finally:
            self.device.asked = before
        if wanted is not None and torch.device(wanted).type == GPU.type:
            flat, _ = tree_flatten(result)
            for leaf in flat:
                self.device.put(leaf)
        return result


def _real(value: Any) -> Any:
    """The CPU for the pretended device."""
    return CPU if isinstance(value, torch.device) else value
