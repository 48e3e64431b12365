"""The target: a trained model, the parameters chosen of it, and its outputs as samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eigendecomp.support import parallel
from eigendecomp.support.examples import Examples, Inputs, chunks


class Target:
    """A model whose chosen parameters are decomposed. Its parameters are read, never changed.

    Args:
        model: any module; a module that returns an object with ``logits`` is read through them.
        parameters: glob patterns over ``model.named_parameters()``.

    Raises:
        ValueError: if a pattern matches nothing, a chosen parameter is not real-valued and finite, or the model is in
            training mode with layers that then depend on chance or on the batch.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[str] = ("*",)) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; give a torch.nn.Module")
        self.model = model
        self.patterns = patterns(parameters)
        named = dict(model.named_parameters())
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(f"parameters={pattern!r} matches none of the model's parameters: {_listing(named)}")
        self.names = [name for name in named if any(fnmatchcase(name, pattern) for pattern in self.patterns)]
        if not self.names:
            raise ValueError(f"no parameter is chosen; give patterns over {_listing(named)}")
        for name in self.names:
            value = named[name]
            if isinstance(value, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name!r} is not initialised yet; run the model once before")
            if not value.is_floating_point():
                raise ValueError(f"parameter {name!r} has dtype {value.dtype}; only real parameters have directions")
            if value.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"parameter {name!r} has dtype {value.dtype}, too coarse to fit directions in; call model.float()"
                )
            if not value.isfinite().all():
                raise ValueError(f"parameter {name!r} holds NaN or infinity; the target must be trained and finite")
            if value.numel() == 0:
                raise ValueError(f"parameter {name!r} is empty; choose others with parameters=[...]")
            first = named[self.names[0]]
            if (value.dtype, value.device) != (first.dtype, first.device):
                raise ValueError(
                    f"parameters {self.names[0]!r} and {name!r} are {first.dtype} on {first.device} and {value.dtype} "
                    f"on {value.device}; choose parameters of one kind, or convert the model"
                )
        for name, module in model.named_modules():
            chance = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if module.training and (chance or batch):
                raise ValueError(
                    f"module {name!r} ({type(module).__name__}) is in training mode, where outputs depend on "
                    f"{'chance' if chance else 'the batch'}; call model.eval() first"
                )
        # A scalar parameter is a vector of one number to the directions.
        self.shapes = {name: tuple(named[name].shape) or (1,) for name in self.names}
        self.dtype = named[self.names[0]].dtype
        self.device = named[self.names[0]].device
        # oneDNN runs an LSTM as one opaque operation, which has no forward derivative and cannot be looked into.
        self.onednn = not any(isinstance(module, nn.LSTM) for module in model.modules())
        # Detached copies share their storage with the model: reading them is reading the model as it is now.
        self.frozen = {name: p.detach() for name, p in named.items() if name not in self.shapes}
        self.chosen = {name: named[name].detach().requires_grad_() for name in self.names}

    @property
    def size(self) -> int:
        """The number of chosen parameters."""
        return sum(p.numel() for p in self.chosen.values())

    def call(self, examples: Sequence[Tensor], chosen: dict[str, Tensor] | None = None) -> Float[Tensor, "e p k"]:
        """Outputs as examples × positions × outputs, with ``chosen`` in the place of the chosen parameters."""
        values = {**self.frozen, **(self.chosen if chosen is None else chosen)}
        mixed = parallel.precision()
        coarse = torch.autocast(self.device.type, mixed) if mixed else nullcontext()
        with plain_operations(self.onednn), coarse:
            return standard(torch.func.functional_call(self.model, values, tuple(examples))).to(self.dtype)

    def _watch(self, examples: Examples) -> "Watch":
        named = {f"its parameter {name!r}": p for name, p in self.model.named_parameters()}
        named |= {f"its buffer {name!r}": buffer for name, buffer in self.model.named_buffers()}
        return Watch(named | {f"its input {i}": tensor for i, tensor in enumerate(examples)})

    @torch.no_grad()
    def outputs(self, inputs: Inputs | Examples, chunk: int = 256) -> Float[Tensor, "e p k"]:
        """Outputs of all examples, ``chunk`` at a time.

        Raises:
            ValueError: if outputs are not real, not finite, or not one row an example.
        """
        rows = []
        for number, part in enumerate(chunks(inputs, chunk)):
            try:
                with nullcontext() if number else self._watch(part):
                    f = self.call(part)
            except (RuntimeError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(f"the model does not run on these inputs: {error}") from error
            if len(f) != len(part[0]):
                raise ValueError(
                    f"the model gives {len(f)} outputs for {len(part[0])} examples; the first axis of its output must "
                    "count the examples"
                )
            if not f.isfinite().all():
                bad = int((~f.isfinite()).flatten(1).any(1).nonzero()[0])
                raise ValueError(f"the model's output is not finite, first for example {number * chunk + bad}")
            rows.append(f)
        return torch.cat(rows)


class Watch(TorchDispatchMode):
    """Refuses to write to tensors that must stay as they are, before it happens."""

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kept = {tensor.untyped_storage().data_ptr(): name for name, tensor in kept.items() if tensor.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.is_write and isinstance(value, Tensor):
                name = self.kept.get(value.untyped_storage().data_ptr())
                if name is not None:
                    raise ValueError(
                        f"the model changes {name} in place ({func}), so its gradients would be another model's; "
                        "use inplace=False or clone() for inputs, and switch off what keeps statistics or renormalises"
                    )
        return func(*args, **kwargs)


def patterns(parameters: object) -> tuple[str, ...]:
    """The patterns as a tuple; ValueError if they are not a sequence of strings."""
    found = (parameters,) if isinstance(parameters, str) else parameters
    if not isinstance(found, Sequence) or not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f"parameters={parameters!r} must be a list of glob patterns, such as ['*'] for all")
    return tuple(found)


@contextmanager
def plain_operations(onednn: bool) -> Iterator[None]:
    """Without the shortcuts of torch that have no forward derivative: fused attention, and an LSTM by oneDNN."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def standard(output: object) -> Float[Tensor, "e p k"]:
    """A model's return value as examples × positions × outputs (one position where it has none)."""
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise ValueError(f"the model returns a {type(output).__name__}; wrap it so that it returns one tensor")
    if not output.is_floating_point():
        raise ValueError(
            f"the model's outputs have dtype {output.dtype}, as class labels have; decompose the real-valued outputs "
            "(logits under KLDivergence, values under SquaredError)"
        )
    if output.ndim == 0:
        raise ValueError("the model returns a single number for all examples; return one row an example, not a loss")
    if output.ndim == 1:
        return output[:, None, None]
    return output.flatten(1, -2) if output.ndim > 3 else output if output.ndim == 3 else output[:, None]


def _listing(named: Mapping[str, Tensor]) -> str:
    names = list(named)
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
