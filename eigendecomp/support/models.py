"""What is asked of a model before it is decomposed, and how it is run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from threading import RLock
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from eigendecomp.support import parallel
from eigendecomp.support.examples import Named
from eigendecomp.support.padding import StillPadding

# A run puts other tensors in the place of the model's parameters and switches parts of torch off, for all threads.
LOCK = RLock()
AT_ONCE = 200  # pairs of an example and a direction that are pushed at once


class Leaves:
    """A model's parameters as they are now, as leaves that share the model's memory.

    They are looked up at each call, since a model may be moved, converted or given other parameters.

    Args:
        chosen: parameters that must stay as they are in kind, and that are differentiated.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
        places = {name: name.rpartition(".") for name, _ in model.named_parameters()}
        self.owners = {name: (model.get_submodule(path), leaf) for name, (path, _, leaf) in places.items()}
        self.chosen = {name: (p.dtype, p.device, tuple(p.shape)) for name, p in chosen.items()}
        self.held: dict[str, Tensor] = {}
        self.moved = False  # whether a parameter got other memory since it was last asked

    def __getstate__(self) -> dict[str, Any]:
        """All but the tensors that share the model's memory: a copy must share its own model's."""
        return self.__dict__ | {"held": {}}

    def now(self, name: str) -> Tensor:
        """One parameter; ValueError if the model has it no more, or in another kind."""
        module, leaf = self.owners[name]
        with LOCK:
            p, held = getattr(module, leaf, None), self.held.get(name)
            if not isinstance(p, Tensor):
                raise ValueError(f"the model has no parameter {name!r} any more; decompose the model as it is now")
            if held is not None and held.data_ptr() == p.data_ptr() and same_kind(held, p):
                return held
            if name in self.chosen:
                self._check_fits(name, p)
            self.moved |= held is not None
            with torch._C._DisableFuncTorch():  # what is held must not belong to a transform that is running
                self.held[name] = p.detach()
            if name in self.chosen:
                self.held[name].requires_grad_()
            return self.held[name]

    def _check_fits(self, name: str, p: Tensor) -> None:
        dtype, device, shape = self.chosen[name]
        if (p.dtype, p.device, tuple(p.shape)) != (dtype, device, shape):
            raise ValueError(
                f"parameter {name!r} is {p.dtype} {tuple(p.shape)} on {p.device}, but its directions are {dtype} "
                f"{shape} on {device}; convert the model back with model.to({device.type!r}, {dtype}), or decompose "
                "it again"
            )

    def renewed(self) -> bool:
        """Whether a parameter that was asked for got other memory since this was last asked."""
        moved, self.moved = self.moved, False
        return moved


def matching(named: Mapping[str, Tensor], patterns: Sequence[str]) -> list[str]:
    """The names that a pattern matches, in order; ValueError if a pattern matches none, or there is none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"parameters={pattern!r} matches none of the model's parameters: {listing(named)}")
    if not patterns:
        raise ValueError(f"no parameter is chosen; give patterns over {listing(named)}")
    return [name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)]


def check_parameters(chosen: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all are finite, of one real kind that is fine enough, and differentiable."""
    first_name, first = next(iter(chosen.items()))
    for name, value in chosen.items():
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
        if (value.dtype, value.device) != (first.dtype, first.device):
            raise ValueError(
                f"parameters {first_name!r} and {name!r} are {first.dtype} on {first.device} and {value.dtype} "
                f"on {value.device}; choose parameters of one kind, or convert the model"
            )


def check_mode(model: nn.Module) -> None:
    """Raises ValueError if a layer is in training mode and then depends on chance or on the batch."""
    for name, module in model.named_modules():
        chance = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and (chance or batch):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) is in training mode, where outputs depend on "
                f"{'chance' if chance else 'the batch'}; call model.eval() first"
            )


class Watch(TorchDispatchMode):
    """Refuses to write to tensors that must stay as they are, before it happens.

    ``channels`` are the tensors whose axis 1 is a convolution's channels, as far as operations keep it there.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kept = {tensor.untyped_storage().data_ptr(): name for name, tensor in kept.items() if tensor.numel()}
        self.channels = WeakIdKeyDictionary()

    @classmethod
    def over(cls, model: nn.Module, inputs: Iterable[Tensor]) -> Self:
        """Watches what a model holds and is given."""
        named = {f"its parameter {name!r}": p for name, p in model.named_parameters()}
        named |= {f"its buffer {name!r}": buffer for name, buffer in model.named_buffers()}
        return cls(named | {f"its input {i}": tensor for i, tensor in enumerate(inputs)})

    def check_channels(self, output: object) -> None:
        """Raises ValueError if an output has a convolution's channels on axis 1."""
        if isinstance(output, Tensor) and output in self.channels:
            raise ValueError(
                f"the model's output {tuple(output.shape)} is a convolution's, with channels on axis 1, but "
                "outputs are compared along the last axis; let the model return output.movedim(1, -1), "
                "where every place is a sample, or output.flatten(1), where an example is one"
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "embedding" in func.__name__:
            check_lookup(func, args)
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


def check_lookup(func: Any, args: tuple) -> None:
    """Raises ValueError if a differentiated table is looked up with an option that makes its gradient another thing."""
    for argument, value in zip(func._schema.arguments, args):
        if argument.name in ("scale_grad_by_freq", "sparse") and value and args[0].requires_grad:
            raise ValueError(
                f"a table {tuple(args[0].shape)} is looked up with {argument.name}=True, which makes its gradient "
                f"{'sparse' if argument.name == 'sparse' else 'no derivative'}; set {argument.name}=False, which gives "
                "the same outputs"
            )


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that is made inside."""

    elements = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out


def at_once(
    run: Callable[[], object], parameters: Mapping[str, Tensor], examples: int, directions: int, budget: int
) -> tuple[int, int]:
    """How many examples and how many directions to push forward at once: few examples and many directions.

    A direction needs about four arrays at a time of its own size and of the largest that ``run``, the model on one
    example, makes.
    """
    with torch.no_grad(), Largest() as largest:
        run()
    each = 4 * next(iter(parameters.values())).element_size()
    size = max(4, min(64, AT_ONCE // directions))
    size = min(size, examples, max(1, budget // (2 * each * largest.elements)))
    numbers = sum(p.numel() for p in parameters.values()) + size * largest.elements
    return size, max(1, min(directions, AT_ONCE // size, budget // (each * numbers)))


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


class Arguments:
    """How a model takes its examples: by position, or by the keywords that the first examples have."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.keywords: tuple[str, ...] | None = None  # empty where they are positional; None before the first

    def __call__(self, examples: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Positional and keyword arguments on the device; ValueError if the keywords are not those of before."""
        names = examples.names if isinstance(examples, Named) else ()
        if self.keywords is None:
            self.keywords = names
        if (names and names != self.keywords) or (self.keywords and len(examples) != len(self.keywords)):
            first = f"the keywords {list(self.keywords)}" if self.keywords else "no keywords"
            raise ValueError(
                f"inputs have the keywords {list(names)}, but those first given have {first}; give the same"
            )
        here = tuple(tensor.to(self.device) for tensor in examples)
        return ((), dict(zip(self.keywords, here, strict=True))) if self.keywords else (here, {})


@contextmanager
def as_run(device: str, onednn: bool) -> Iterator[None]:
    """How a model is run: in the precision of the processes, without operations that cannot be looked into.

    Those are shortcuts of torch without forward derivative: fused attention, and an LSTM by oneDNN.
    """
    mixed = parallel.precision()
    lstm = nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False)
    with LOCK, torch.autocast(device, mixed) if mixed else nullcontext(), lstm:
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def differentiable(model: nn.Module, names: Iterable[str]) -> Iterator[list[nn.Parameter]]:
    """Inside, autograd follows these parameters of a model, whatever they were set to."""
    with LOCK, torch.enable_grad():
        own = dict(model.named_parameters())
        chosen = [own[name] for name in names]
        frozen = [p for p in chosen if not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_()
            yield chosen
        finally:
            for p in frozen:
                p.requires_grad_(False)


@contextmanager
def moved(chosen: Mapping[str, Tensor], steps: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the steps are added to parameters; afterwards these are bit for bit what they were.

    Padded tokens are given the row that was there, as their row has no derivative.
    """
    with LOCK:  # no other thread runs a model that is moved
        kept = {name: p.detach().clone() for name, p in chosen.items()}
        try:
            with torch.no_grad():
                for name, p in chosen.items():
                    p.add_(steps[name].view(p.shape))
            with StillPadding(*((p, kept[name]) for name, p in chosen.items())):
                yield
        finally:
            with torch.no_grad():
                for name, p in chosen.items():
                    p.copy_(kept[name])


def check_outputs(f: Float[Tensor, "e p k"], examples: Sequence[Tensor], before: int) -> None:
    """Raises ValueError if outputs are not finite, or not one an example; ``before`` examples came before these."""
    if len(f) != len(examples[0]):
        raise ValueError(
            f"the model gives {len(f)} outputs for {len(examples[0])} examples; the first axis of its output must "
            "count the examples"
        )
    if not f.isfinite().all():
        bad = int((~f.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"the model's output is not finite, first for example {before + bad}")


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


def listing(named: Mapping[str, Tensor]) -> str:
    """The first names, for an error."""
    names = list(named)
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
