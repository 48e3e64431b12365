"""The target: a trained model, the parameters chosen of it, and its outputs as samples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.support import models
from eigendecomp.support.axes import grouped
from eigendecomp.support.checks import patterns
from eigendecomp.support.examples import Examples, Inputs, chunks
from eigendecomp.support.models import LOCK
from eigendecomp.support.padding import StillPadding


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
        self.names = models.matching(named, self.patterns)
        models.check_parameters({name: named[name] for name in self.names})
        models.check_mode(model)
        # A scalar parameter is a vector of one number to the directions.
        self.shapes = grouped({name: tuple(named[name].shape) or (1,) for name in self.names}, group)
        self.dtype = named[self.names[0]].dtype
        self.device = named[self.names[0]].device
        # oneDNN runs an LSTM as one opaque operation, which has no forward derivative and cannot be looked into.
        self.onednn = not any(isinstance(module, nn.LSTM) for module in model.modules())
        self._arguments = models.Arguments(self.device)
        self._leaves = models.Leaves(model, {name: named[name] for name in self.names})
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
            return models.standard(self._run(examples, chosen)).to(self.dtype)

    def differentiable(self) -> AbstractContextManager[list[nn.Parameter]]:
        """Inside, the chosen parameters of the model itself, which autograd follows whatever they were set to."""
        return models.differentiable(self.model, self.names)

    def itself(self, examples: Sequence[Tensor]) -> Float[Tensor, "e p k"]:
        """Outputs of the model as it is, with nothing put in the place of its parameters."""
        positional, named = self._arguments(examples)
        with models.as_run(self.device.type, self.onednn):
            return models.standard(self.model(*positional, **named)).to(self.dtype)

    def _run(self, examples: Sequence[Tensor], chosen: dict[str, Tensor] | None) -> object:
        """What the model returns with these values in the place of its parameters."""
        own = self.chosen
        values = {**self.frozen, **(own if chosen is None else chosen)}
        positional, named = self._arguments(examples)
        padding = nullcontext() if chosen is None else StillPadding(*((x, own[name]) for name, x in chosen.items()))
        with models.as_run(self.device.type, self.onednn), padding:
            return torch.func.functional_call(self.model, values, positional, named)

    def outputs(self, inputs: Inputs | Examples, chunk: int = 256) -> Float[Tensor, "e p k"]:
        """Outputs of all examples, as :meth:`pieces` gives them."""
        return torch.cat(list(self.pieces(inputs, chunk)))

    @torch.no_grad()
    def pieces(self, inputs: Inputs | Examples, chunk: int) -> Iterator[Float[Tensor, "some p k"]]:
        """Outputs of all examples, ``chunk`` at a time; of the first, nothing may be changed in place.

        Raises:
            ValueError: if outputs are not real, not finite, or not one row an example.
        """
        for number, some in enumerate(chunks(inputs, chunk)):
            try:
                f = self.call(some) if number else self._watched(some)
            except (RuntimeError, TypeError, IndexError, AttributeError) as error:
                raise ValueError(f"the model does not run on these inputs: {error}") from error
            models.check_outputs(f, some, number * chunk)
            yield f

    def _watched(self, examples: Examples) -> Float[Tensor, "e p k"]:
        """Outputs of a run in which nothing may be changed in place, nor channels be left on axis 1."""
        with LOCK, models.Watch.over(self.model, examples) as watch:
            output = self._run(examples, None)
            watch.check_channels(getattr(output, "logits", output))
            return models.standard(output).to(self.dtype)
