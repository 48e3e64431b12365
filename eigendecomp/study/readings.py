"""Where in its input a direction is used, and what it looks for there.

A weight that multiplies is used once at every position (a token, or a patch of an image), and ⟨g, u⟩ is a sum over
these uses. Each term is a product of what arrives there, met by the direction's input-side factor, its *reader*, and
of what is asked of the output, met by its output-side factor, its *writer*.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendecomp.batches import Data
from eigendecomp.decomposition import CHUNK, Decomposition
from eigendecomp.directions import Directions
from eigendecomp.divergence import Divergence
from eigendecomp.factored.samples import UseSamples
from eigendecomp.factored.source import Axes, CapturedSource
from eigendecomp.factored.terms import Factored
from eigendecomp.reference import Draws, Mean, Reference
from eigendecomp.settings import Settings
from eigendecomp.sparsity import BatchTopK
from eigendecomp.support.examples import Inputs, as_examples, chunks
from eigendecomp.support.random import generator
from eigendecomp.target import Target, patterns


def contributions(d: Decomposition, inputs: Inputs, seed: int = 0) -> dict[str, Float[Tensor, "n t v"]]:
    """Every position's term of a sample's coefficients: {parameter: (samples, positions, directions)}, signed.

    Summed over positions and parameters they are ``d.encode(inputs, seed)``. Positions are those at which the weight
    is used: tokens in order, patches row by row.

    Raises:
        ValueError: if a chosen parameter is not a weight that multiplies (a bias, a scale), which has no such terms.
    """
    examples, settings, noise = as_examples(inputs), d.settings, generator(seed, "encode")
    source = CapturedSource(d.target, examples, form=False)
    source.axes()  # refuses what has no positions
    pieces: dict[str, list[Tensor]] = {name: [] for name in d.encoder.shapes}
    with torch.no_grad():
        for some in chunks(examples, CHUNK):
            shape = len(some[0]), source.outputs[0]
            draws = Draws.of(settings.reference, settings.divergence, d.pool, shape, 1, noise)
            for factored in source.gradients(some, draws).parts:
                assert isinstance(factored, Factored)
                pieces[factored.names[0]].append(_placed(factored.inner_by_row(d.encoder), source.outputs[0]))
    return {name: torch.cat(rows) for name, rows in pieces.items()}


def _placed(terms: Float[Tensor, "n t v"], positions: int) -> Float[Tensor, "n t v"]:
    """Where outputs depend on their own position alone (the last layers), that term among zeros for the others."""
    if terms.shape[1] > 1 or positions == 1:
        return terms
    own = torch.eye(positions, dtype=terms.dtype, device=terms.device)
    return (terms.unflatten(0, (-1, positions)) * own.unsqueeze(-1)).flatten(0, 1)


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
    """What arrives and what is asked at every use: {parameter: (inputs, output gradients)}, example by example.

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
    return {name: _pair(_rows(d, side), name, uses[-1])[0] for name, uses in axes.items()}


def writers(d: Decomposition, inputs: Inputs, side: str = "encoder") -> dict[str, Float[Tensor, "v k o"]]:
    """Each direction's output-side factors in every weight: where it acts. See :func:`readers`."""
    axes = _source(d, inputs).axes()
    return {name: _pair(_rows(d, side), name, uses[-1])[1] for name, uses in axes.items()}


def read(d: Decomposition, inputs: Inputs, side: str = "encoder") -> dict[str, Float[Tensor, "e t v"]]:
    """Readers applied to what each weight meets: {parameter: (examples, positions, directions)}.

    Signed at rank one; at a higher rank the norm over the rank's terms. Takes a forward pass and no reference.

    Raises:
        ValueError: if a chosen parameter is not a weight that multiplies.
    """
    examples, rows = as_examples(inputs), _rows(d, side)
    source = _source(d, examples)
    axes = source.axes()
    pieces: dict[str, list[Tensor]] = {name: [] for name in axes}
    for some in chunks(examples, CHUNK):
        products: dict[str, Tensor] = {}
        for name, sides in source.inputs(some).items():
            for data, use in zip(sides, axes[name], strict=True):
                reader = _pair(rows, name, use)[0]
                products[name] = products.get(name, 0) + data.dot(reader)[0].unflatten(-1, reader.shape[:2])
        for name, values in products.items():
            pieces[name].append((values.squeeze(-1) if values.shape[-1] == 1 else values.norm(dim=-1)).detach())
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _rows(d: Decomposition, side: str) -> Directions:
    if side not in ("encoder", "decoder"):
        raise ValueError(f"side={side!r} must be 'encoder' or 'decoder'")
    return d.encoder if side == "encoder" else d.decoder


def _pair(rows: Directions, name: str, use: Axes) -> tuple[Tensor, Tensor]:
    """Input side and output side."""
    left, right = rows.pair(name, use.left)
    return (left, right) if use.input_is_left else (right, left)


def _source(d: Decomposition, inputs: Inputs) -> CapturedSource:
    """The decomposition's own, prepared for inputs of this shape."""
    examples = as_examples(inputs)
    source = d.captured(examples)
    source.prepare(examples)
    return source
