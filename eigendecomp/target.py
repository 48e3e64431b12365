"""The target: a trained model, the parameters chosen of it, and its outputs as samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from threading import RLock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from eigendecomp.support import parallel
from eigendecomp.support.examples import Examples, Inputs, Named, chunks

# A run puts other tensors in the place of the model's parameters and switches parts of torch off, for all threads.
LOCK = RLock()


class Target:
    """A model whose chosen parameters are decomposed. Its parameters are read, never changed.

    The first axis of an output counts the examples and the last one holds what is compared; axes between are positions,
    each a sample of its own. Where a model has its channels on axis 1, as convolutions do, they must be moved last.

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
            if value.is_meta:
                raise ValueError(f"parameter {name!r} is on the meta device, without values; load the weights first")
            if value.is_inference():
                raise ValueError(
                    f"parameter {name!r} was made in inference mode, where nothing has gradients; load the model "
                    "outside torch.inference_mode()"
                )
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
        self.keywords: tuple[str, ...] | None = None  # what the inputs are called; empty where they are positional
        self.moved = False  # whether a parameter got other memory since it was last asked
        owners = {name: name.rpartition(".") for name in named}
        self._owners = {name: (model.get_submodule(path), leaf) for name, (path, _, leaf) in owners.items()}
        self._held: dict[str, Tensor] = {}
        assert len(self.chosen) + len(self.frozen) == len(named)  # held before a transform can be the first to ask

    @property
    def chosen(self) -> dict[str, Tensor]:
        """The chosen parameters as they are now, as leaves that share the model's memory."""
        return {name: self._now(name) for name in self.names}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The other parameters as they are now, detached."""
        return {name: self._now(name) for name in self._owners if name not in self.shapes}

    def _now(self, name: str) -> Tensor:
        module, leaf = self._owners[name]
        with LOCK:
            p, held = getattr(module, leaf, None), self._held.get(name)
            if not isinstance(p, Tensor):
                raise ValueError(f"the model has no parameter {name!r} any more; decompose the model as it is now")
            if held is not None and held.data_ptr() == p.data_ptr() and same_kind(held, p):
                return held
            if name in self.shapes:
                self._check_fits(name, p)
            self.moved |= held is not None
            with torch._C._DisableFuncTorch():  # what is held must not belong to a transform that is running
                self._held[name] = p.detach()
            if name in self.shapes:
                self._held[name].requires_grad_()
            return self._held[name]

    def _check_fits(self, name: str, p: Tensor) -> None:
        found, made = (p.dtype, p.device), (self.dtype, self.device)
        if found != made or (tuple(p.shape) or (1,)) != self.shapes[name]:
            raise ValueError(
                f"parameter {name!r} is {p.dtype} {tuple(p.shape)} on {p.device}, but its directions are {self.dtype} "
                f"{self.shapes[name]} on {self.device}; convert the model back with model.to({self.device.type!r}, "
                f"{self.dtype}), or decompose it again"
            )

    def renewed(self) -> bool:
        """Whether a chosen parameter got other memory since this was last asked."""
        assert self.chosen is not None  # looks at every one
        moved, self.moved = self.moved, False
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """All but the tensors that share the model's memory: a copy must share its own model's."""
        return self.__dict__ | {"_held": {}}

    @property
    def size(self) -> int:
        """The number of chosen parameters."""
        return sum(p.numel() for p in self.chosen.values())

    def call(self, examples: Sequence[Tensor], chosen: dict[str, Tensor] | None = None) -> Float[Tensor, "e p k"]:
        """Outputs as examples × positions × outputs, with ``chosen`` in the place of the chosen parameters."""
        with LOCK:
            return standard(self._run(examples, chosen)).to(self.dtype)

    @contextmanager
    def differentiable(self) -> Iterator[list[Tensor]]:
        """Inside, the chosen parameters of the model itself, which autograd follows whatever they were set to."""
        with LOCK, torch.enable_grad():
            own = dict(self.model.named_parameters())
            chosen = [own[name] for name in self.names]
            frozen = [p for p in chosen if not p.requires_grad]
            try:
                for p in frozen:
                    p.requires_grad_()
                yield chosen
            finally:
                for p in frozen:
                    p.requires_grad_(False)

    def itself(self, examples: Sequence[Tensor]) -> Float[Tensor, "e p k"]:
        """Outputs of the model as it is, with nothing put in the place of its parameters."""
        positional, named = self._arguments(examples)
        with self._as_run():
            return standard(self.model(*positional, **named)).to(self.dtype)

    def _run(self, examples: Sequence[Tensor], chosen: dict[str, Tensor] | None) -> object:
        """What the model returns with these values in the place of its parameters."""
        values = {**self.frozen, **(self.chosen if chosen is None else chosen)}
        positional, named = self._arguments(examples)
        with self._as_run():
            return torch.func.functional_call(self.model, values, positional, named)

    @contextmanager
    def _as_run(self) -> Iterator[None]:
        """How the model is run: by one thread, in the precision of the processes, without opaque operations."""
        mixed = parallel.precision()
        coarse = torch.autocast(self.device.type, mixed) if mixed else nullcontext()
        with LOCK, plain_operations(self.onednn), coarse:
            yield

    def _arguments(self, examples: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        self._learn_names(examples)
        if self.keywords:
            return (), dict(zip(self.keywords, examples, strict=True))
        return tuple(examples), {}

    def _learn_names(self, examples: Sequence[Tensor]) -> None:
        names = examples.names if isinstance(examples, Named) else ()
        if self.keywords is None:
            self.keywords = names
        if (names and names != self.keywords) or (self.keywords and len(examples) != len(self.keywords)):
            first = f"the keywords {list(self.keywords)}" if self.keywords else "no keywords"
            raise ValueError(
                f"inputs have the keywords {list(names)}, but those first given have {first}; give the same"
            )

    def _watched(self, examples: Examples) -> Float[Tensor, "e p k"]:
        """Outputs of a run in which nothing may be changed in place, nor channels be left on axis 1."""
        with LOCK, self._watch(examples) as watch:
            output = self._run(examples, None)
            output = getattr(output, "logits", output)
            if isinstance(output, Tensor) and output in watch.channels:
                raise ValueError(
                    f"the model's output {tuple(output.shape)} is a convolution's, with channels on axis 1, but "
                    "outputs are compared along the last axis; let the model return output.movedim(1, -1), "
                    "where every place is a sample, or output.flatten(1), where an example is one"
                )
            return standard(output).to(self.dtype)

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
                f = self.call(part) if number else self._watched(part)
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
    """Refuses to write to tensors that must stay as they are, before it happens.

    ``channels`` are the tensors whose axis 1 is a convolution's channels, as far as operations keep it there.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kept = {tensor.untyped_storage().data_ptr(): name for name, tensor in kept.items() if tensor.numel()}
        self.channels = WeakIdKeyDictionary()

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
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and keeps_channels(func, args, result, self.channels):
            self.channels[result] = True
        return result


def keeps_channels(func: Any, args: tuple, result: Tensor, channels: WeakIdKeyDictionary) -> bool:
    """Whether a result has channels on axis 1: a convolution's, or what other operations make of one."""
    name = func._schema.name
    if result.ndim < 3 or any(word in name for word in ("permute", "transpose", "movedim", "view", "reshape", "bmm")):
        return False
    given = [value for value in args if isinstance(value, Tensor) and value in channels]
    like = any(value.ndim == result.ndim and value.shape[:2] == result.shape[:2] for value in given)
    return "convolution" in name or like


def same_kind(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors at one address read it alike."""
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())


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
