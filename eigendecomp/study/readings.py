"""What a direction looks for in its input, and where it acts.

A weight that multiplies is used once at every position (a token, or a patch of an image), and ⟨g, u⟩ is a sum over
these uses. Each term is the product of two numbers: the input there with the direction's input-side factor, its
*reader*, and the output gradient there with its output-side factor, its *writer*.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.decomposition import CHUNK, Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence
from eigendecomp.factored.data import Data
from eigendecomp.factored.samples import UseSamples
from eigendecomp.factored.source import Axes, CapturedSource
from eigendecomp.reference import Mean, Reference
from eigendecomp.settings import Settings
from eigendecomp.sparsity import BatchTopK
from eigendecomp.support.examples import Inputs, as_examples, chunks
from eigendecomp.support.random import generator
from eigendecomp.target import Target, patterns


@torch.no_grad()
def factors(
    model: nn.Module,
    inputs: Inputs,
    *,
    divergence: Divergence,
    parameters: Sequence[str],
    reference: Reference | None = None,
    scale: Literal["unit"] | None = None,
    group: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, tuple[Float[Tensor, "n i"], Float[Tensor, "n o"]]]:
    """Inputs and output gradients of every use: {parameter: (inputs, output gradients)}, example by example.

    Their outer products are the gradients that ``ed.decompose(..., samples="uses")`` rebuilds; see there for the
    settings. Where a parameter's output has several axes they are flattened in their order.

    Raises:
        ValueError: if a parameter is not a weight that multiplies once at every position.
    """
    settings = Settings(
        divergence, Mean() if reference is None else reference, patterns(parameters), n_directions=1,
        rank=1, factorization="cp", tied=True, sparsity=BatchTopK(1.0), steps=1, batch_size=1, learning_rate=1.0,
        seed=seed, samples="uses", scale=scale, group=group,
    )  # fmt: skip
    target = Target(model, settings.parameters, settings.group)
    data = Data.read(target, inputs, settings)
    source, noise = UseSamples(target, data.probe, settings).source, generator(seed, "references")
    if several := [name for name, uses in source.axes.items() if len(uses) != 1]:
        raise ValueError(f"{several[0]!r} multiplies more than once at a position; leave it out")
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in source.axes}
    for some in chunks(as_examples(inputs), CHUNK):
        draws = data.draws.again((len(some[0]), source.captured.outputs[0]), 1, noise)
        for name, ((x, delta),) in source.factors(some, draws).items():
            pieces[name].append((x.flatten(0, 1), delta[0].flatten(0, 1)))
    return {name: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
            for name, pairs in pieces.items()}  # fmt: skip


def readers(d: Decomposition, inputs: Inputs, side: str = "encoder") -> dict[str, Float[Tensor, "v k i"]]:
    """Each direction's input-side factors in every weight, one for each rank: what it looks for.

    ``inputs`` are a few examples that show how the weights are used; ``side`` is ``"encoder"`` or ``"decoder"``.
    """
    axes = _source(d, inputs).axes()
    return {name: _pair(_directions(d, side), name, uses[-1])[0] for name, uses in axes.items()}


def writers(d: Decomposition, inputs: Inputs, side: str = "encoder") -> dict[str, Float[Tensor, "v k o"]]:
    """Each direction's output-side factors in every weight: where it acts. See :func:`readers`."""
    axes = _source(d, inputs).axes()
    return {name: _pair(_directions(d, side), name, uses[-1])[1] for name, uses in axes.items()}


def apply_readers(d: Decomposition, inputs: Inputs, side: str = "encoder") -> dict[str, Float[Tensor, "e t v"]]:
    """Readers applied to the inputs of every weight: {parameter: (examples, positions, directions)}.

    Signed at rank one; at a higher rank the norm over the rank's terms. Takes a forward pass and no reference.

    Raises:
        ValueError: if a chosen parameter is not a weight that multiplies.
    """
    examples, directions = as_examples(inputs), _directions(d, side)
    source = _source(d, examples)
    axes = source.axes()
    pieces: dict[str, list[Tensor]] = {name: [] for name in axes}
    for some in chunks(examples, CHUNK):
        products: dict[str, Tensor] = {}
        for name, sides in source.inputs(some).items():
            for data, use in zip(sides, axes[name], strict=True):
                reader = _pair(directions, name, use)[0]
                products[name] = products.get(name, 0) + data.dot(reader)[0].unflatten(-1, reader.shape[:2])
        for name, values in products.items():
            pieces[name].append((values.squeeze(-1) if values.shape[-1] == 1 else values.norm(dim=-1)).detach())
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _directions(d: Decomposition, side: str) -> Directions:
    if side not in ("encoder", "decoder"):
        raise ValueError(f"side={side!r} must be 'encoder' or 'decoder'")
    return d.encoder if side == "encoder" else d.decoder


def _pair(directions: Directions, name: str, use: Axes) -> tuple[Tensor, Tensor]:
    """Input side and output side."""
    left, right = directions.pair(name, use.left)
    return (left, right) if use.input_is_left else (right, left)


def _source(d: Decomposition, inputs: Inputs) -> CapturedSource:
    """The decomposition's own, prepared for inputs of this shape."""
    examples = as_examples(inputs)
    source = d.captured(examples)
    source.prepare(examples)
    return source
