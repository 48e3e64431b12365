"""Switching off what a network computes for one feature, and what that does to all the rest.

A move (see :mod:`eigendecomp.study.moves`) has a step. The step is looked for in the same way for every method: the one
whose sum of what is left of the feature's computation, as a share, and of what is changed elsewhere, as a share of all
that is there, is least. Both are told.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eigendecomp.study.autoencoders import Autoencoder
from eigendecomp.study.moves import Move, displaced

Computed = Callable[[nn.Module, Tensor], Float[Tensor, "n k"]]


@dataclass(frozen=True)
class Effect:
    """What a step does.

    Args:
        step: the step.
        left: the share of the feature's computation that is left, in squared size: of what its output gains when it
            is put on in samples in which others are on too.
        beside: the squared change of the other outputs in these samples, in units of the feature's computation.
        elsewhere: the squared change on data in which the feature is not on, in units of all that is computed there.
    """

    step: float
    left: float
    beside: float
    elsewhere: float


class Switch:
    """One feature of a network: samples in which it is on, and data in which anything is.

    ``computed(model, inputs)`` is what is to be switched off, output by output. The feature's own is what the output
    ``feature`` gains by the input ``feature`` in the samples ``on``, against zero there. Where neurons are shared it
    disturbs the other outputs of these samples, and that goes with it: what happens there is told apart (``beside``)
    and is not held against a step.
    """

    def __init__(
        self,
        model: nn.Module,
        computed: Computed,
        on: Float[Tensor, "n features"],
        data: Float[Tensor, "m features"],
        feature: int,
    ) -> None:
        self.model, self.computed, self.feature, self.size = model, computed, feature, len(on)
        without = on.clone()
        without[:, feature] = 0
        self.inputs = torch.cat([on, without, data])
        self.off_in_data: Bool[Tensor, " m"] = data[:, feature] <= 0
        self.base = self._values(model)
        self.unit = self._gain(self.base).square().sum()
        self.rest = self._rest(self.base).square().sum()

    @torch.no_grad()
    def _values(self, model: nn.Module) -> Float[Tensor, "n k"]:
        return self.computed(model, self.inputs)

    def _gain(self, values: Float[Tensor, "n k"]) -> Float[Tensor, " m"]:
        return (values[: self.size] - values[self.size : 2 * self.size])[:, self.feature]

    def _rest(self, values: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        return values[2 * self.size :][self.off_in_data]

    def effect(self, move: Move, step: float) -> Effect:
        """What the model does with the move at this step."""
        with move(step) as moved:
            values = self._values(moved)
        change = values - self.base
        others = torch.arange(change.shape[1]) != self.feature
        beside = change[: self.size, others].square().sum()
        own, elsewhere = self._gain(values).square().sum() / self.unit, self._rest(change).square().sum() / self.rest
        return Effect(step, own.item(), (beside / self.unit).item(), elsewhere.item())

    def off(self, move: Move, largest: float, *, both: bool = False, tries: int = 10) -> Effect:
        """The effect of the best step up to ``largest``, as :func:`search` finds it."""
        return search(lambda step: self.effect(move, step), largest, both=both, tries=tries)


def search(effect: Callable[[float], Effect], largest: float, *, both: bool = False, tries: int = 10) -> Effect:
    """The effect of the best step up to ``largest``.

    With ``both`` steps go either way: the way in which a small one is better. The best of a grid, and then of ever
    smaller brackets about it (golden sections).
    """
    if both and loss(effect(-largest / 50)) < loss(effect(largest / 50)):
        largest = -largest
    best = min((effect(largest * k / 8) for k in range(1, 9)), key=loss)
    low, high = sorted((best.step - largest / 8, best.step + largest / 8))
    ratio = (5**0.5 - 1) / 2
    a, b = effect(high - ratio * (high - low)), effect(low + ratio * (high - low))
    for _ in range(tries):
        if loss(a) < loss(b):
            high, b = b.step, a
            a = effect(high - ratio * (high - low))
        else:
            low, a = a.step, b
            b = effect(low + ratio * (high - low))
    return min((best, a, b), key=loss)


def loss(effect: Effect) -> float:
    """What steps and places are chosen by."""
    return effect.left + effect.elsewhere


def best(effects: Iterable[Effect]) -> Effect:
    """The best of several places."""
    return min(effects, key=loss)


def scaled_unit(sae: Autoencoder, model: nn.Module, module: str, unit: int) -> Move:
    """δ ↦ the model in which an autoencoder's unit counts for 1 − δ of itself wherever it is on."""

    @contextmanager
    def move(delta: float) -> Iterator[nn.Module]:
        with sae.steered(model, module, {unit: -delta}, how="scale") as moved:
            yield moved

    return move


def without(model: nn.Module, weight: str, column: int) -> Move:
    """δ ↦ the model in which the neuron that this column of a weight writes for counts for 1 − δ of itself."""
    value = dict(model.named_parameters())[weight].detach()
    change = torch.zeros_like(value)
    change[:, column] = -value[:, column]
    return displaced(model, {weight: change})


def restricted(model: nn.Module, parts: dict[str, Tensor], names: Sequence[str]) -> Move:
    """δ ↦ the model moved by δ along a direction's part in some parameters alone."""
    return displaced(model, {name: parts[name] for name in names})
