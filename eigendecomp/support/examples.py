"""Examples: what a target is run on, in memory or larger than it.

Three kinds are read the same way: tensors, a map-style dataset, and an iterable one. A fit takes its batches from a
:class:`Feed`, whose place can be kept and found again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from eigendecomp.support import parallel

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Dataset
Examples = tuple[Tensor, ...]
BUFFER = 2048  # examples of an iterable dataset among which the next one is drawn


class Named(tuple[Tensor, ...]):
    """Examples whose tensors a model takes by keyword, in the order of the names."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Iterable[Tensor], names: Sequence[str]) -> "Named":
        named = cls(tensors)
        named.names = tuple(names)
        return named


def alike(examples: Examples, tensors: Iterable[Tensor]) -> Examples:
    """Tensors under the names of the examples, if these have any."""
    return Named.of(tensors, examples.names) if isinstance(examples, Named) else tuple(tensors)


def kind(inputs: object) -> str:
    """``"tensors"``, ``"indexed"`` (length and items) or ``"iterable"``.

    Raises:
        ValueError: for what is none of them, or can be gone through only once.
    """
    if isinstance(inputs, (Tensor, list, tuple, Mapping)):
        return "tensors"
    if isinstance(inputs, DataLoader):
        raise ValueError("inputs is a DataLoader, which gives batches; give its dataset, loader.dataset")
    if hasattr(inputs, "iloc"):
        raise ValueError(f"inputs is a {type(inputs).__name__}; give torch.as_tensor(inputs.to_numpy())")
    if not isinstance(inputs, (Mapping, str, bytes)):
        if not isinstance(inputs, IterableDataset) and hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"):
            return "indexed"
        if isinstance(inputs, Iterator):
            raise ValueError(f"inputs is a {type(inputs).__name__}, which can be read only once; give a dataset")
        if isinstance(inputs, Iterable):
            return "iterable"
    raise ValueError(f"inputs is a {type(inputs).__name__}; give a tensor, a tuple of tensors or a dataset")


def as_examples(inputs: object) -> Examples:
    """Inputs in memory as a tuple of tensors that share their first axis.

    Raises:
        ValueError: if there is no example, the first axes differ, or a value is not finite.
    """
    if kind(inputs) != "tensors":
        raise ValueError(f"inputs is a {type(inputs).__name__}; here a tensor or a tuple of tensors is needed")
    examples = in_order(inputs)
    if not examples:
        raise ValueError("inputs is an empty tuple; give at least one tensor")
    names = examples.names if isinstance(examples, Named) else range(len(examples))
    for position, tensor in zip(names, examples, strict=True):
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"inputs[{position!r}] is a {type(tensor).__name__}; give a tensor or a tuple of tensors, "
                "as torch.as_tensor and torch.stack make them"
            )
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(
                f"inputs[{position!r}] is {tensor.layout} on {tensor.device}; give a dense tensor with values"
            )
        if tensor.ndim == 0:
            raise ValueError(f"inputs[{position!r}] is a single number; its first axis must count the examples")
        good = tensor.isfinite()
        if isinstance(examples, Named) and "mask" in str(position):
            good |= tensor == -torch.inf  # what a mask forbids
        if tensor.is_floating_point() and not good.all():
            bad = (~good).reshape(len(tensor), -1).any(1)
            raise ValueError(
                f"inputs[{position!r}] holds NaN or infinity, first in example {int(bad.nonzero()[0])} "
                f"({int(bad.sum())} of {len(tensor)}); remove or mend those examples"
            )
    sizes = {len(tensor) for tensor in examples}
    if len(sizes) != 1:
        raise ValueError(f"the input tensors hold {sorted(sizes)} examples; the first axes must agree")
    if sizes == {0}:
        raise ValueError("inputs hold zero examples; give at least one")
    # Autograd keeps no tensor of inference mode.
    return alike(examples, (tensor.clone() if tensor.is_inference() else tensor for tensor in examples))


def in_order(inputs: Any) -> Examples:
    """The tensors of inputs in memory, those of a mapping in the order of their names."""
    if isinstance(inputs, Mapping):
        names = sorted(inputs, key=str)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"inputs is a mapping with the keys {names}; give the names of the model's arguments")
        return Named.of((inputs[name] for name in names), names)
    return (inputs,) if isinstance(inputs, Tensor) else inputs if isinstance(inputs, Named) else tuple(inputs)


def chunks(inputs: Inputs | Examples, size: int) -> Iterator[Examples]:
    """All examples, ``size`` at a time; never more than that in memory for a dataset."""
    which = kind(inputs)
    if which == "tensors":
        examples = as_examples(inputs)
        for start in range(0, len(examples[0]), size):
            yield alike(examples, (tensor[start : start + size] for tensor in examples))
    elif which == "iterable":
        held = []
        for item in cast(Iterable, inputs):
            held.append(item)
            if len(held) == size:
                yield collate(held)
                held = []
        if held:
            yield collate(held)
    else:
        n = len(cast(Any, inputs))
        for start in range(0, n, size):
            yield fetch(inputs, range(start, min(start + size, n)))


def first(inputs: Inputs | Examples, count: int) -> Examples:
    """The first ``count`` examples, or all if there are fewer."""
    for examples in chunks(inputs, count):
        return examples
    raise ValueError("inputs hold zero examples; give at least one")


def count(inputs: Inputs | Examples) -> int | None:
    """How many examples there are; None where nobody knows before the end."""
    which = kind(inputs)
    if which == "tensors":
        return len(as_examples(inputs)[0])
    return None if which == "iterable" else len(cast(Any, inputs))


def fetch(inputs: Inputs | Examples, numbers: Iterable[int]) -> Examples:
    """Chosen examples of tensors or of a map-style dataset."""
    if isinstance(inputs, (Tensor, tuple, list, Mapping)):
        index, examples = torch.as_tensor(list(numbers)), in_order(inputs)
        return alike(examples, (tensor[index] for tensor in examples))
    return collate([cast(Any, inputs)[int(number)] for number in numbers])


def collate(items: Sequence[object]) -> Examples:
    """A list of single examples as a batch; each is a tensor, a tuple of tensors, or a row of one column.

    Raises:
        ValueError: for anything else, rows of several columns above all: which go to the model is not ours to guess.
    """
    if isinstance(items[0], Mapping) and len(items[0]) == 1:  # a table with one column
        items = [value for item in items for value in cast(Mapping, item).values()]
    if isinstance(items[0], Mapping):
        raise ValueError(
            f"an example of the dataset is a dictionary with {sorted(map(str, items[0]))}; select the column that is "
            "the model's input, or wrap the dataset so that it gives a tensor or a tuple of tensors"
        )
    try:
        batch = default_collate(list(items))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the dataset's examples do not make a batch: {error}") from None
    return as_examples(batch)


class Feed(Protocol):
    """Training examples without end; each dataset is gone through as a whole before it begins again."""

    def take(self, count: int) -> Examples:
        """This process's share of the next ``count`` examples."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The place in the data, as tensors."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


class Shuffled:
    """Indices 0 … n − 1, or the examples behind them, in one random order after another."""

    def __init__(self, inputs: Inputs | Examples, n: int, generator: torch.Generator) -> None:
        self.inputs, self.n, self.generator = inputs, n, generator
        self.left = torch.empty(0, dtype=torch.long)

    def indices(self, count: int) -> Tensor:
        while len(self.left) < count:
            self.left = torch.cat([self.left, torch.randperm(self.n, generator=self.generator)])
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def take(self, count: int) -> Examples:
        return fetch(self.inputs, self.indices(count)[parallel.share(count)].tolist())

    def state(self) -> dict[str, Tensor]:
        return {"left": self.left, "generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.left = state["left"]
        self.generator.set_state(state["generator"])


class Buffered:
    """An iterable dataset, each example drawn at random among the next ``BUFFER``.

    Its place is the number of examples taken: to find it again, the dataset is read from the start up to there.
    """

    def __init__(self, inputs: Inputs, generator: torch.Generator) -> None:
        self.inputs, self.generator = inputs, generator
        self.begin = generator.get_state()
        self._start()

    def _start(self) -> None:
        self.generator.set_state(self.begin)
        self.items, self.buffer, self.taken = self._endless(), [], 0

    def _endless(self) -> Iterator[object]:
        while True:
            empty = True
            for item in cast(Iterable, self.inputs):
                empty = False
                yield item
            if empty:
                raise ValueError(
                    "the iterable dataset gives no example (any more); it must be possible to iterate it again"
                )

    def _draw(self) -> object:
        while len(self.buffer) < BUFFER:
            self.buffer.append(next(self.items))
        place = int(torch.randint(BUFFER, (), generator=self.generator))
        drawn, self.buffer[place] = self.buffer[place], next(self.items)
        self.taken += 1
        return drawn

    def take(self, count: int) -> Examples:
        return collate([self._draw() for _ in range(count)][parallel.share(count)])

    def state(self) -> dict[str, Tensor]:
        return {"taken": torch.tensor(self.taken)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._start()
        for _ in range(int(state["taken"])):
            self._draw()


def feed(inputs: Inputs | Examples, generator: torch.Generator) -> Feed:
    """The feed that fits the kind of inputs."""
    n = count(inputs)
    return Buffered(cast(Dataset, inputs), generator) if n is None else Shuffled(inputs, n, generator)
