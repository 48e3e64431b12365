"""Acting on a model along directions, and measuring what moves: sizes in natural units, at equal effect.

A *move* turns a step δ into the model with something changed by it, inside a context manager, so that directions,
steering vectors and arbitrary changes of the weights are measured by the same few functions. Effects are changes of the
output in standard deviations of the output over the inputs, or of what a ``view`` makes of the output.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eigendecomp.curvature import push_forward
from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import SquaredError
from eigendecomp.support.examples import Inputs, as_examples
from eigendecomp.support.models import moved, standard
from eigendecomp.target import Target

Move = Callable[[float], AbstractContextManager[nn.Module]]

# ---------------------------------------------------------------------------------------------------------------------
# Moves


def along(d: Decomposition, steps: int | Mapping[int, float]) -> Move:
    """δ ↦ the model with its parameters moved by δ along one direction, or by δ times these steps along several."""
    share = {steps: 1.0} if isinstance(steps, int) else dict(steps)
    return lambda delta: d.perturbed({number: delta * weight for number, weight in share.items()})


def displaced(model: nn.Module, change: Mapping[str, Tensor]) -> Move:
    """δ ↦ the model with δ times ``change`` added to the parameters it names; bit for bit restored afterwards.

    Raises:
        ValueError: if the model has no such parameter, or its shape differs.
    """
    named = dict(model.named_parameters())
    for name, value in change.items():
        if name not in named:
            raise ValueError(f"the model has no parameter {name!r}")
        if named[name].numel() != value.numel():
            raise ValueError(f"the change of {name!r} has shape {tuple(value.shape)}, not {tuple(named[name].shape)}")

    @contextmanager
    def move(delta: float) -> Iterator[nn.Module]:
        with moved({name: named[name] for name in change}, {name: delta * value for name, value in change.items()}):
            yield model

    return move


def low_rank(directions: Directions, number: int) -> dict[str, Tensor]:
    """One direction as a change of the weights, for :func:`displaced`."""
    return {name: directions.select([number]).dense(name)[0] for name in directions.shapes}


def gradient(
    model: nn.Module, inputs: Inputs, loss: Callable[[Tensor], Tensor], parameters: Sequence[str] = ("*",)
) -> dict[str, Tensor]:
    """The unit change of the weights that lowers ``loss(outputs)`` fastest, for :func:`displaced`."""
    target, examples = Target(model, parameters), as_examples(inputs)
    values = {name: p.detach().clone().requires_grad_() for name, p in target.chosen.items()}
    grads = torch.autograd.grad(loss(target.call(examples, values).flatten(0, 1)), list(values.values()))
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    return {name: -grad / norm for name, grad in zip(values, grads, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Effects


def probabilities(logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """What a classifier says, which a shift of all logits does not change."""
    return logits.softmax(-1)


@dataclass
class Probe:
    """Inputs on which effects are measured, with the outputs of the unmoved model.

    ``view`` turns outputs (n, k) into what is compared, such as :func:`probabilities` for logits.
    """

    model: nn.Module
    inputs: Inputs
    view: Callable[[Tensor], Tensor] = lambda f: f
    base: Float[Tensor, "n k"] = field(init=False)
    unit: float = field(init=False)
    samples: Bool[Tensor, " m"] | None = field(init=False, default=None)  # those that count; None for all

    def __post_init__(self) -> None:
        Target(self.model)  # refuses a model whose outputs are a matter of chance
        self.base = self.outputs(self.model)
        self.unit = (self.base - self.base.mean(0)).square().sum(-1).mean().sqrt().item()
        if not self.unit > 0:
            raise ValueError("the output is the same for all inputs, so there is no unit to measure its changes in")

    def among(self, samples: Bool[Tensor, " n"]) -> "Probe":
        """The same probe on some of its samples alone; the model is run on the examples that hold any."""
        examples, other = as_examples(self.inputs), copy.copy(self)
        mask = samples if self.samples is None else self.samples.masked_scatter(self.samples, samples)
        mask = mask.view(len(examples[0]), -1)
        held = mask.any(1)
        other.inputs, other.samples = tuple(tensor[held] for tensor in examples), mask[held].flatten()
        other.base = self.base[samples]
        return other

    def run(self, model: nn.Module) -> Float[Tensor, "m k"]:
        """The model's outputs on the inputs."""
        return standard(model(*as_examples(self.inputs))).flatten(0, 1)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Float[Tensor, "n k"]:
        """What is compared, of every sample that counts."""
        f = self.run(model)
        return self.view(f if self.samples is None else f[self.samples])

    def moved(self, move: Move, delta: float) -> Float[Tensor, "n k"]:
        """f_δ(x) − f(x), as it is."""
        with move(delta) as model:
            return self.outputs(model) - self.base

    def change(self, move: Move, delta: float) -> Float[Tensor, "n k"]:
        """f_δ(x) − f(x), in standard deviations of the output."""
        return self.moved(move, delta) / self.unit

    def effect(self, move: Move, delta: float) -> Float[Tensor, " n"]:
        """How far each sample's output moves, in standard deviations of the output."""
        return self.change(move, delta).norm(dim=-1)

    def matched(self, move: Move, on: Bool[Tensor, " n"], level: float) -> tuple[float, Float[Tensor, " n"]]:
        """A step that moves the samples ``on`` by ``level`` on average, and its effect on every sample.

        Raises:
            ValueError: if no such step is found.
        """
        reached = matched(lambda s: self.effect(move, s), lambda effect: effect[on].mean(), level, tolerance=1e-4)
        if reached is None:
            raise ValueError(f"no step was found that moves the samples by {level:g} standard deviations")
        return reached

    def selectivity(self, move: Move, on: Bool[Tensor, " n"], level: float) -> float:
        """The mean effect on the samples ``on`` over the mean effect elsewhere, where the former is ``level``."""
        effect = self.matched(move, on, level)[1]
        return (effect[on].mean() / effect[~on].mean().clamp_min(1e-12)).item()


def matched(
    measure: Callable[[float], Tensor],
    size: Callable[[Tensor], Tensor],
    level: float,
    *,
    first: float = 1e-3,
    tolerance: float = 0.01,
    largest: float = 1e4,
    tries: int = 40,
) -> tuple[float, Tensor] | None:
    """A step at which the size of what is measured is ``level``, to ``tolerance`` of it, and what is measured there.

    The first step is ``first``, whose sign all have. A secant through the last two, in logarithms, since effects start
    in proportion, proposes the next, at most 8 times as far or as near; where it leaves the interval known to hold the
    level, that is halved. None where no step up to ``largest`` reaches the level, or not in so many tries.
    """
    low, high, step, slope = 0.0, math.inf, abs(first), 1.0  # steps known to fall short and to go too far
    last: tuple[float, float] | None = None
    for _ in range(tries):
        measured = measure(math.copysign(step, first))
        now = size(measured).item()
        if abs(now - level) <= tolerance * level:
            return math.copysign(step, first), measured
        short = now < level
        low, high = (step, high) if short else (low, step)
        here = math.log(step), math.log(max(now, 1e-30))
        if last is not None:
            slope = (here[1] - last[1]) / (here[0] - last[0])
        last = here
        far = (math.log(level) - here[1]) / slope if slope > 0 else math.nan
        guess = step * math.exp(min(max(far, -math.log(8)), math.log(8)))
        if not low < guess < high:  # also where the guess is not a number
            guess = math.sqrt(low * high) if low > 0 and high < math.inf else step * (8 if short else 1 / 8)
        step = guess
        if step > largest:
            return None
    return None


@dataclass
class Push:
    """What a move does once the samples it is meant for have changed by a set amount."""

    step: float
    on: float  # mean total variation of the outputs meant, which are probabilities
    off: dict[str, float]  # the same on other sets of samples
    toward: Float[Tensor, " k"]  # mean change of each probability on the samples meant

    def selectivity(self, name: str) -> float:
        """The change where it is meant over that on other samples."""
        return self.on / max(self.off[name], 1e-6)

    def share(self, k: int) -> float:
        """The part of the mean change that output ``k`` gains or loses; 1 is all that one output can."""
        return (self.toward[k].abs() / max(self.on, 1e-9)).item()


def variation(change: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """½ Σ|p_δ − p| of every sample, given the change of its probabilities."""
    return change.abs().sum(-1) / 2


def total_variation(probe: Probe, move: Move, delta: float) -> Float[Tensor, " n"]:
    """½ Σ|p_δ − p| of every sample; the probe's view must be :func:`probabilities`."""
    return variation(probe.moved(move, delta))


def push(
    on: Probe,
    off: Mapping[str, Probe],
    move: Move,
    level: float,
    *,
    first: float = 0.1,
    tolerance: float = 0.01,
    largest: float = 1e3,
) -> Push | None:
    """Move along until the mean total variation on the samples ``on`` is ``level``; see what that does elsewhere.

    None where no step found by :func:`matched` does; the sign of ``first`` is that of the step.
    """
    size = lambda change: variation(change).mean()  # noqa: E731
    reached = matched(lambda step: on.moved(move, step), size, level, first=first, tolerance=tolerance, largest=largest)
    if reached is None:
        return None
    step, change = reached
    elsewhere = {name: total_variation(probe, move, step).mean().item() for name, probe in off.items()}
    return Push(step, variation(change).mean().item(), elsewhere, change.mean(0))


def push_either_way(
    on: Probe, off: Mapping[str, Probe], move: Move, level: float, *, by: str, first: float = 0.1, **search: float
) -> Push | None:
    """The more selective of :func:`push` forwards and backwards, judged on the samples named ``by``."""
    both = (push(on, off, move, level, first=sign * first, **search) for sign in (1, -1))
    return max((one for one in both if one), key=lambda one: one.selectivity(by), default=None)


def predicted(d: Decomposition, probe: Probe) -> Float[Tensor, "n v"]:
    """‖J u‖ in standard deviations of the output: each sample's effect of a unit step, to first order."""
    moved = push_forward(d.target, SquaredError(), d.decoder, as_examples(probe.inputs))  # S = 2I
    return moved.norm(dim=-1) / (2**0.5 * probe.unit)


def interference(d: Decomposition, a: tuple[int, float], b: tuple[int, float], probe: Probe) -> float:
    """How far two moves fail to add: ‖Δ_ab − Δ_a − Δ_b‖ / ‖Δ_a + Δ_b‖ over all samples."""
    one, two = (probe.change(along(d, number), delta) for number, delta in (a, b))
    both = probe.change(along(d, dict([a, b])), 1.0)
    return ((both - one - two).norm() / (one + two).norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Learning changes


@dataclass
class Tuned:
    """A change of the weights that was learned, and the numbers that it is written with."""

    change: dict[str, Tensor]
    free: list[Tensor]

    @property
    def size(self) -> int:
        return sum(tensor.numel() for tensor in self.free)


class Subspace:
    """w + Σ_v s_v u_v: one scalar for each of some directions."""

    def __init__(self, d: Decomposition, numbers: Sequence[int]) -> None:
        few = d.decoder.select(list(numbers))
        self.directions = {name: few.dense(name).detach() for name in few.shapes}
        self.free = [torch.zeros(len(numbers), requires_grad=True)]

    def __call__(self) -> dict[str, Tensor]:
        return {name: torch.tensordot(self.free[0], u, 1) for name, u in self.directions.items()}


class Full:
    """w + Δ, every number free."""

    def __init__(self, target: Target) -> None:
        self.change = {name: torch.zeros(shape, requires_grad=True) for name, shape in target.shapes.items()}
        self.free = list(self.change.values())

    def __call__(self) -> dict[str, Tensor]:
        return self.change


class LoRA:
    """W + BA of a given rank for every matrix, B zero at the start; other tensors stay."""

    def __init__(self, target: Target, rank: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shapes = {name: shape for name, shape in target.shapes.items() if len(shape) == 2}
        self.names = list(shapes)
        self.free = []
        for rows, columns in shapes.values():
            a = torch.randn(rank, columns, generator=draw) / columns**0.5
            self.free += [torch.zeros(rows, rank, requires_grad=True), a.requires_grad_()]

    def __call__(self) -> dict[str, Tensor]:
        pairs = zip(self.names, self.free[::2], self.free[1::2], strict=True)
        return {name: b @ a for name, b, a in pairs}


def tune(
    target: Target,
    change: Subspace | Full | LoRA,
    inputs: Inputs,
    loss: Callable[[Float[Tensor, "n k"]], Tensor],
    *,
    until: float = 0.0,
    steps: int = 500,
    learning_rate: float = 1e-2,
) -> Tuned:
    """Lower ``loss(outputs)`` on the inputs with Adam by what ``change`` leaves free, until it is ``until`` or less.

    The model itself stays as it is.
    """
    examples = as_examples(inputs)
    optimizer = torch.optim.Adam(change.free, lr=learning_rate, fused=True)
    for step in range(steps + 1):
        moved = change()
        values = {name: p.detach() + moved[name] if name in moved else p for name, p in target.chosen.items()}
        value = loss(target.call(examples, values).flatten(0, 1))
        if value.item() <= until or step == steps:
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return Tuned({name: value.detach().clone() for name, value in change().items()}, change.free)
