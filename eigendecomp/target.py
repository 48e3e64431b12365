"""The target: a trained model, the parameters chosen of it, and its outputs as samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.support import parallel
from eigendecomp.support.axes import grouped
from eigendecomp.support.examples import Examples, Inputs, Named, chunks
from eigendecomp.support.models import (
    LOCK,
    Leaves,
    Watch,
    check_mode,
    check_parameters,
    listing,
    plain_operations,
    standard,
)


class Target:
    """A model whose chosen parameters are decomposed. Its parameters are read, never changed.

    The first axis of an output counts the examples and the last one holds what is compared; axes between are positions,
    each a sample of its own. Where a model has its channels on axis 1, as convolutions do, they must be moved last.

    Args:
        model: any module; a module that returns an object with ``logits`` is read through them.
        parameters: glob patterns over ``model.named_parameters()``.
        group: by pattern, axes that share one factor of a direction: ``{"*.W_V": "head model d -> (head d) model"}``.

    Raises:
        ValueError: if a pattern matches nothing, a chosen parameter is not real-valued and finite, or the model is in
            training mode with layers that then depend on chance or on the batch.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[str] = ("*",), group: Mapping[str, str] | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is a {type(model).__name__}; give a torch.nn.Module")
        self.model = model
        self.patterns = patterns(parameters)
        named = dict(model.named_parameters())
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(f"parameters={pattern!r} matches none of the model's parameters: {listing(named)}")
        self.names = [name for name in named if any(fnmatchcase(name, pattern) for pattern in self.patterns)]
        if not self.names:
            raise ValueError(f"no parameter is chosen; give patterns over {listing(named)}")
        check_parameters({name: named[name] for name in self.names})
        check_mode(model)
        # A scalar parameter is a vector of one number to the directions.
        self.shapes = grouped({name: tuple(named[name].shape) or (1,) for name in self.names}, group)
        self.dtype = named[self.names[0]].dtype
        self.device = named[self.names[0]].device
        # oneDNN runs an LSTM as one opaque operation, which has no forward derivative and cannot be looked into.
        self.onednn = not any(isinstance(module, nn.LSTM) for module in model.modules())
        self.keywords: tuple[str, ...] | None = None  # what the inputs are called; empty where they are positional
        self._leaves = Leaves(model, {name: named[name] for name in self.names})
        assert len(self.chosen) + len(self.frozen) == len(named)  # held before a transform can be the first to ask

    @property
    def chosen(self) -> dict[str, Tensor]:
        """The chosen parameters as they are now, as leaves that share the model's memory."""
        return {name: self._leaves.now(name) for name in self.names}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The other parameters as they are now, detached."""
        return {name: self._leaves.now(name) for name in self._leaves.owners if name not in self.shapes}

    def renewed(self) -> bool:
        """Whether a chosen parameter got other memory since this was last asked."""
        assert self.chosen is not None  # looks at every one
        return self._leaves.renewed()

    @property
    def size(self) -> int:
        """The number of chosen parameters."""
        return sum(p.numel() for p in self.chosen.values())

    def call(self, examples: Sequence[Tensor], chosen: dict[str, Tensor] | None = None) -> Float[Tensor, "e p k"]:
        """Outputs as examples × positions × outputs, with ``chosen`` in the place of the chosen parameters."""
        with LOCK:
            return standard(self._run(examples, chosen)).to(self.dtype)

    @contextmanager
    def differentiable(self) -> Iterator[list[nn.Parameter]]:
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
        here = tuple(tensor.to(self.device) for tensor in examples)
        return ((), dict(zip(self.keywords, here, strict=True))) if self.keywords else (here, {})

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
        with LOCK, Watch.over(self.model, examples) as watch:
            output = self._run(examples, None)
            watch.check_channels(getattr(output, "logits", output))
            return standard(output).to(self.dtype)

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


def patterns(parameters: object) -> tuple[str, ...]:
    """The patterns as a tuple; ValueError if they are not a sequence of strings."""
    found = (parameters,) if isinstance(parameters, str) else parameters
    if not isinstance(found, Sequence) or not all(isinstance(pattern, str) for pattern in found):
        raise ValueError(f"parameters={parameters!r} must be a list of glob patterns, such as ['*'] for all")
    return tuple(found)
