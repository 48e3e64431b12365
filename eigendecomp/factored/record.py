"""Seeing every use of chosen parameters in a forward pass, whatever module or function makes it.

The pass runs under a dispatch mode that is shown every operation below autograd. A weight is recognised by the memory
it lies in, through any view, transpose or copy. Each use (:mod:`eigendecomp.factored.operations`) is recorded with its
input and with the place of its output in the graph of derivatives, to which backward passes can then be run.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eigendecomp.factored.layouts import NotUnderstood, Storage, Weight, laid_out, storages
from eigendecomp.factored.local import Local
from eigendecomp.factored.operations import KINDS, Call, Embedding, Node, Use, aten
from eigendecomp.target import Target

COPIES = {aten.clone.default, aten._to_copy.default}
FEW_SAMPLES = 128  # up to so many, one backward pass for all cotangents beats one for each


class Occurrence(NamedTuple):
    """Which of a run's operations with weights one is."""

    operation: Any
    names: tuple[str, ...]  # of the weights' parameters
    number: int  # from one on, of this operation with these

    def __str__(self) -> str:
        return f"{self.operation} {self.number} of {' and '.join(self.names)}"


class Trace(TorchDispatchMode):
    """Records every use of the chosen parameters during a forward pass.

    Args:
        storages: where the parameters' entries lie.
        constant: the operations whose outputs are the same for all examples. A lookup copies the weight;
            another output is read as a parameter.
        made: the storages of such outputs, from earlier runs.
        keep: numbers of operations whose outputs are wanted; None for all.
        noise: disturbs the output of every use, so that units which are dead on the given examples live.
    """

    def __init__(
        self,
        storages: Mapping[int, Storage],
        constant: Collection[Occurrence] = (),
        made: dict[tuple, Storage] | None = None,
        keep: Collection[int] | None = (),
        noise: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.storages, self.constant, self.keep, self.noise = dict(storages), constant, keep, noise
        self.operations: list[Any] = []
        self.uses: list[Use] = []
        self.kept: dict[int, Node] = {}
        self.unknown: dict[str, str] = {}  # parameter: the operation that is not understood
        self.made = {} if made is None else made
        self.derived: dict[str, tuple[Node, tuple[str, ...]]] = {}  # outputs read as parameters, and of which
        self.met: Counter[tuple] = Counter()  # operations with weights, by their parameters
        self.waiting: list[Node] = []  # for their place in the graph
        self.alive: list[Tensor] = []  # copies of weights, kept so that their memory is not used again
        self.output: Node

    def weight(self, value: object) -> Weight | None:
        """The parameter's entries that a tensor is made of, if it is."""
        if not isinstance(value, Tensor):
            return None
        storage = self.storages.get(value.untyped_storage().data_ptr())
        return None if storage is None or not value.is_floating_point() else storage.weight(value)

    def settle(self) -> None:
        for node in self.waiting:
            node.settle()
        self.waiting.clear()

    @property
    def signature(self) -> list[tuple]:
        """What must be the same in every run."""
        return [use.signature for use in self.uses]

    def roots(self, name: str) -> tuple[str, ...]:
        """The parameters that a parameter or a derived one is made of."""
        return self.derived[name][1] if name in self.derived else (name,)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.waiting:
            self.settle()
        kwargs, tensors = kwargs or {}, [(place, x) for place, x in enumerate(args) if isinstance(x, Tensor)]
        weights = {place: weight for place, x in tensors if (weight := self.weight(x)) is not None}
        lists = [value for value in (*args, list(kwargs.values())) if isinstance(value, (list, tuple)) and value]
        others = [weight for values in lists for value in values if (weight := self.weight(value)) is not None]
        result = func(*args, **kwargs)
        if func is not aten.detach.default:  # which torch calls more often when outputs are kept
            if isinstance(result, Tensor) and (self.keep is None or len(self.operations) in self.keep):
                self.waiting.append(self.kept.setdefault(len(self.operations), Node(result)))
            self.operations.append(func)
        if met := [*weights.values(), *others]:
            plain = not (others or (kwargs and func not in COPIES) or any(weight.partial for weight in met))
            self._read(Call(func, args, result, weights, kwargs), met, plain)  # a keyword may scale a term
        return result

    def _read(self, call: Call, met: Sequence[Weight], plain: bool) -> None:
        """Record the uses in one operation; where one is not understood, its parameter and the operation."""
        names, count = tuple(dict.fromkeys(weight.name for weight in met)), len(self.uses)
        self.met[call.operation, names] += 1
        which = Occurrence(call.operation, names, self.met[call.operation, names])
        if which in self.constant and KINDS.get((call.operation, 0)) is not Embedding:
            return self._derive(which, call.output)
        for name in names:
            try:
                self._add(self._uses(call, name, plain), which)
            except NotUnderstood:
                try:
                    self._add([Local.of(call, name, self.weight)], which)
                except NotUnderstood:
                    self.unknown = dict.fromkeys(self.roots(name), str(call.operation)) | self.unknown
        if self.noise is not None and len(self.uses) > count:
            y = self.uses[-1].output
            y += torch.randn(y.shape, generator=self.noise).to(y) * (1 + y.square().mean().sqrt())

    def _uses(self, call: Call, name: str, plain: bool) -> list[Use]:
        """The uses of a parameter in an operation of a known kind; raises :class:`NotUnderstood` for another."""
        uses: list[Use] = []
        if not plain:
            raise NotUnderstood(str(call.operation))
        for place, weight in [(i, weight) for i, weight in call.weights.items() if weight.name == name]:
            if call.operation in COPIES and call.output.is_floating_point():
                self._copied(call.output, weight.copy(call.output))
            elif (kind := KINDS.get((call.operation, place))) is not None:
                uses += kind.of(call, place)
            elif not self._is_view(call, name):
                raise NotUnderstood(str(call.operation))
        return uses

    def _add(self, uses: Sequence[Use], which: Occurrence) -> None:
        for use in uses:
            use.occurrence = which
            if which in self.constant and isinstance(use, Embedding):
                entries = use.weight.index[use.data]
                self._copied(use.output, use.weight.copy(use.output, tuple(use.data.flatten().tolist()), entries))
            else:
                self.uses.append(use)
                self.waiting.append(use)

    def _derive(self, which: Occurrence, out: Tensor) -> None:
        """Read the output of an operation as a parameter."""
        name, place = str(which), (which, out.shape, out.stride())
        if place not in self.made:
            counting = torch.arange(out.numel(), device=out.device).view(out.shape)
            self.made[place] = Storage(name, laid_out(counting, out))
        self.derived[name] = Node(out), tuple(dict.fromkeys(root for each in which.names for root in self.roots(each)))
        self.waiting.append(self.derived[name][0])
        self._copied(out, self.made[place])

    def _copied(self, out: Tensor, storage: Storage) -> None:
        self.storages[out.untyped_storage().data_ptr()] = storage
        self.alive.append(out)

    def _is_view(self, call: Call, name: str) -> bool:
        """Whether the result is a view of a weight, or has no derivative."""
        if call.operation is aten.detach.default:
            return name in self.derived  # torch does so itself where the output of an operation is kept
        if call.operation._schema.is_mutable:
            return False
        results = call.result if isinstance(call.result, (list, tuple)) else [call.result]
        tensors = [result for result in results if isinstance(result, Tensor) and result.is_floating_point()]
        return all(self.weight(tensor) is not None for tensor in tensors)


class Recorder:
    """Runs a model with every use of its chosen parameters recorded, and sends cotangents back to the uses."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.constant: set[Occurrence] = set()  # the operations whose outputs all examples share
        self.made: dict[tuple, Storage] = {}  # where these lie
        self.batched = True  # whether torch can batch the model's backward pass
        self.shared = self.look_again()

    def look_again(self) -> dict[str, str]:
        """Find where the parameters' entries lie; returns those that cannot be told apart, with the reason."""
        self.storages, self.shared = storages(self.target.chosen)
        return self.shared

    def leave(self, names: Collection[str]) -> None:
        """Look no more at the uses of these parameters."""
        self.storages = {at: storage for at, storage in self.storages.items() if storage.name not in names}

    def run(
        self, examples: Sequence[Tensor], keep: Collection[int] | None = (), noise: torch.Generator | None = None
    ) -> Trace:
        """A forward pass with its output, (e, p, k), and every use on the way there; :class:`Trace` has the options."""
        with torch.enable_grad(), Trace(self.storages, self.constant, self.made, keep, noise) as trace:
            f = self.target.call(examples)
        trace.settle()
        trace.output = Node(f).settle()
        trace.uses = [use for use in trace.uses if use.edge is not None]
        return trace

    def pull(
        self, node: Node, nodes: Sequence[Node], c: Float[Tensor, "c *out"], samples: int = 0
    ) -> list[Float[Tensor, "c *shape"]]:
        """What several cotangents of one node send back to others; ``samples`` tells how large the batch is."""
        ends = {end.place: end for end in nodes}  # a product and the bias added to it have one output
        if not ends:
            return []
        edges = [end.edge for end in ends.values()]
        back = partial(torch.autograd.grad, [node.edge], edges, retain_graph=True, allow_unused=True)
        pulled: Sequence[Tensor | None]
        if len(c) == 1:
            pulled = [None if g is None else g.unsqueeze(0) for g in back([c[0]])]
        elif self.batched and samples <= FEW_SAMPLES:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch says which operations inside it could not batch
                    pulled = back([c], is_grads_batched=True)
            except RuntimeError:
                self.batched = False
                return self.pull(node, nodes, c)
        else:
            pulled = stacks = [end.output.new_empty(len(c), *end.output.shape) for end in ends.values()]
            for i, one in enumerate(c):
                for stack, g in zip(stacks, back([one]), strict=True):
                    stack[i] = 0 if g is None else g
        by_place = {
            place: end.output.new_zeros(len(c), *end.output.shape) if g is None else g
            for (place, end), g in zip(ends.items(), pulled, strict=True)
        }
        return [by_place[end.place] for end in nodes]
