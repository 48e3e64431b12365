"""Each use of a weight by itself: directions of the gradients of single positions.

An output's gradient is a sum over the positions at which a weight was used, and a sum of many uses hides each. Here a
sample is one position instead: what arrived there, and what *all* outputs (with a reference each) ask of the weights
there. One backward pass gives the gradients of every position of an example, where those of its outputs take a pass
each; and no gradient is longer than its factors. Directions found this way are directions in the same space, and a
:class:`Decomposition` is made of them like any other; only its coefficients' scale, and with it the threshold, is that
of uses: :class:`UseDecomposition` keeps it apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigendecomp.batches import POOL_SAMPLES
from eigendecomp.decomposition import Decomposition
from eigendecomp.directions import Factorization
from eigendecomp.divergence import Divergence
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.terms import Factored, Side
from eigendecomp.fit import fit
from eigendecomp.gradients import Gradients
from eigendecomp.objective import squared_error
from eigendecomp.reference import Draws, Reference
from eigendecomp.settings import Settings
from eigendecomp.sparsity import Sparsity
from eigendecomp.support.checks import patterns
from eigendecomp.support.examples import Feed, Inputs, Shuffled, as_examples, chunks
from eigendecomp.support.random import generator
from eigendecomp.target import Target

CHUNK = 64  # examples at a time


@dataclass
class Uses:
    """The two factors of every use: {parameter: (what arrived, what is asked)}, rows ordered example by example."""

    target: Target
    positions: int
    rows: dict[str, tuple[int, ...]]  # the axes of the parameter that its first factor runs over
    data_first: dict[str, bool]
    data: dict[str, Float[Tensor, "n i"]]
    asked: dict[str, Float[Tensor, "n o"]]

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def gradients(self, index: Int[Tensor, " m"] | slice = slice(None)) -> Gradients:
        """The gradients of some of the uses."""
        parts = []
        for name, rows in self.rows.items():
            sides = [Side(x[index][None, :, None], x.shape[1]) for x in (self.data[name], self.asked[name])]
            pair = (sides[0], sides[1]) if self.data_first[name] else (sides[1], sides[0])
            parts.append(Factored(name, self.target.shapes[name], rows, [pair]))
        return Gradients(self.target.shapes, parts)

    @cached_property
    def norms(self) -> Float[Tensor, " n"]:
        """‖g‖ of every use, over all parameters."""
        squares = [self.data[name].square().sum(1) * self.asked[name].square().sum(1) for name in self.rows]
        return torch.stack(squares).sum(0).sqrt()

    def alike(self) -> "Uses":
        """The same uses with every gradient at unit norm, so that all count alike; those of no size stay zero."""
        scale = self.norms.clamp_min(1e-9 * self.norms.max()).reciprocal().unsqueeze(1)
        return replace(self, asked={name: delta * scale for name, delta in self.asked.items()})

    def first(self, examples: int) -> "Uses":
        """The uses of the first examples."""
        n = examples * self.positions
        data, asked = ({name: x[:n] for name, x in side.items()} for side in (self.data, self.asked))
        return replace(self, data=data, asked=asked)

    def select(self, names: Sequence[str]) -> "Uses":
        """The uses of some of the parameters alone."""
        target = Target(self.target.model, list(names))
        kept = [
            {name: value[name] for name in target.names}
            for value in (self.rows, self.data_first, self.data, self.asked)
        ]
        return Uses(target, self.positions, *kept)  # type: ignore[arg-type]


@torch.no_grad()
def collect(
    model: nn.Module,
    inputs: Inputs,
    *,
    divergence: Divergence,
    reference: Reference,
    parameters: Sequence[str],
    seed: int = 0,
    pool: Float[Tensor, "m k"] | None = None,
) -> tuple[Uses, Float[Tensor, "m k"]]:
    """Every position's use of the chosen weights, with one drawn reference an output, and the pool of references.

    Give the pool of a first call to a second one on other examples, so that both draw from the same outputs.

    Raises:
        ValueError: if a chosen parameter is not a weight that multiplies once at every position.
    """
    target, examples = Target(model, patterns(parameters)), as_examples(inputs)
    if pool is None:
        f = target.outputs(tuple(tensor[: POOL_SAMPLES // 32] for tensor in examples))
        pool = reference.prepare(divergence, divergence.predict(f.flatten(0, 1)), generator(seed, "pool"))
    draw = generator(seed, "references")
    source = CapturedSource(target, tuple(tensor[:3] for tensor in examples), form=False)
    axes = source.axes()
    for name, uses in axes.items():
        if len(uses) != 1:
            raise ValueError(f"{name!r} is not a weight that multiplies once at every position; leave it out")
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in target.names}
    for part in chunks(examples, CHUNK):
        shape = len(part[0]), source.outputs[0]
        draws = Draws.of(reference, divergence, pool, shape, 1, draw)
        for name, ((data, asked),) in source.factors(part, draws).items():
            found[name].append((data.flatten(0, 1), asked[0].flatten(0, 1)))
    met, wanted = ({name: torch.cat([pair[i] for pair in pairs]) for name, pairs in found.items()} for i in (0, 1))
    counts = {name: len(x) // len(examples[0]) for name, x in met.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the weights are used at different numbers of positions: {counts}; choose some that agree")
    first = {name: use.input_is_left for name, (use,) in axes.items()}
    rows = {name: use.left for name, (use,) in axes.items()}
    return Uses(target, next(iter(counts.values())), rows, first, met, wanted), pool


class UseBatches:
    """Batches of uses that are held in memory."""

    def __init__(self, uses: Uses, draw: torch.Generator) -> None:
        self.uses = uses
        self.feed: Feed = Shuffled((torch.zeros(len(uses)),), len(uses), draw)

    def batch(self, size: int, generator: torch.Generator) -> Gradients:
        assert isinstance(self.feed, Shuffled)
        return self.uses.gradients(self.feed.indices(size))


class UseDecomposition(Decomposition):
    """Directions of uses. Their threshold is of coefficients of uses, so no sparse code of a whole sample has one."""

    use_threshold: float | None = None

    def encode(self, inputs: Inputs, seed: int = 0, *, sparse: bool = False) -> Float[Tensor, "n v"]:
        """⟨g, u⟩ of whole samples, as :meth:`Decomposition.encode` gives it.

        Raises:
            ValueError: for ``sparse``, as the threshold is that of single uses.
        """
        if sparse:
            raise ValueError(f"sparse={sparse} needs a threshold of samples, and these directions have one of uses")
        return super().encode(inputs, seed)

    def reconstruction_error(self, inputs: Inputs, seed: int = 0) -> float:
        """Refused.

        Raises:
            ValueError: always; uses are what these directions rebuild.
        """
        raise ValueError("these directions rebuild uses, not samples: call study.positions.reconstruction_error")


def decompose(
    uses: Uses,
    pool: Float[Tensor, "m k"],
    *,
    divergence: Divergence,
    reference: Reference,
    n_directions: int,
    rank: int = 1,
    factorization: Factorization = "cp",
    tied: bool = False,
    sparsity: Sparsity,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    seed: int = 0,
    progress: bool = False,
) -> UseDecomposition:
    """Learn directions that rebuild the gradients of uses; see :func:`eigendecomp.decompose` for the settings.

    ``divergence``, ``reference`` and ``pool`` are those of :func:`collect`; the result reads new samples with them.
    """
    settings = Settings(
        divergence, reference, tuple(uses.target.names), n_directions, rank, factorization, tied, sparsity, steps,
        batch_size, learning_rate, seed,
    )  # fmt: skip
    batches = UseBatches(uses, generator(seed, "data"))
    found = fit(uses.target, batches, settings, progress=progress)
    made = UseDecomposition(uses.target, settings, found.encoder, found.decoder, None, pool, found.history)
    made.use_threshold = found.threshold
    return made


@torch.no_grad()
def coefficients(d: Decomposition, uses: Uses) -> Float[Tensor, "n v"]:
    """⟨g, u⟩ of every use, signed."""
    return torch.cat([uses.gradients(part).inner(d.encoder) for part in _slices(uses)])


@torch.no_grad()
def reconstruction_error(d: UseDecomposition, uses: Uses) -> tuple[float, float]:
    """Σ‖g − ĝ‖² / Σ‖g‖² over uses of the kind that it was fitted to, and the mean number of coefficients kept."""
    gram, left, total, kept = d.decoder.gram(), 0.0, 0.0, 0
    for part in _slices(uses):
        g = uses.gradients(part)
        s = d.settings.sparsity.keep(g.inner(d.encoder), d.use_threshold)
        squares = g.square_norms()
        left += squared_error(squares, s, g.inner(d.decoder), gram).item()
        total += squares.sum().item()
        kept += int((s != 0).sum())
    return left / total, kept / len(uses)


def _slices(uses: Uses, size: int = 2048) -> list[slice]:
    return [slice(start, start + size) for start in range(0, len(uses), size)]
