"""The public door: decompose a model, and what one then asks of its directions."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigendecomp.curvature import curvatures, push_forward
from eigendecomp.directions import Directions, Factorization
from eigendecomp.divergence import Divergence, SquaredError
from eigendecomp.factored.data import Data
from eigendecomp.factored.guard import Mistaken
from eigendecomp.factored.samples import CHUNK, SAMPLES, Samples, pieces
from eigendecomp.factored.source import CapturedSource
from eigendecomp.fit import fit
from eigendecomp.gradients import Gradients
from eigendecomp.objective import squared_error
from eigendecomp.reference import Draws, Mean, OtherSample, Reference
from eigendecomp.settings import Settings
from eigendecomp.sparsity import BatchTopK, Sparsity
from eigendecomp.storage import identity
from eigendecomp.support import files, parallel
from eigendecomp.support.algebra import strongest
from eigendecomp.support.axes import check_rank
from eigendecomp.support.checkpoint import Checkpoint
from eigendecomp.support.checks import choice, patterns, real, whole
from eigendecomp.support.doors import Doors
from eigendecomp.support.examples import Examples, Inputs, as_examples, chunks, first
from eigendecomp.support.history import History
from eigendecomp.support.models import moved
from eigendecomp.support.random import generator
from eigendecomp.support.show import Shown, of_decomposition
from eigendecomp.target import Target

log = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class Decomposition(Shown, Doors):
    """Directions learned for a target, with all that is needed to read new samples along them."""

    target: Target
    settings: Settings
    encoder: Directions  # read coefficients; the decoder itself where they are tied
    decoder: Directions  # rebuild gradients
    threshold: float | None  # the |z| from which a coefficient is kept; None keeps all
    pool: Float[Tensor, "m k"]  # predictions of which references are made
    history: History
    seen: Examples = ()  # the examples that the pool was made from, if they are known
    _samples: Samples | None = None  # where gradients come from, once they were asked for

    def __getstate__(self) -> dict[str, Any]:
        """All but the source, which belongs to this process and is prepared again when it is needed."""
        return self.__dict__ | {"_samples": None}

    def summary(self) -> list[tuple[str, str]]:
        """The shapes, what the fit was asked for, and what became of it."""
        return of_decomposition(self)

    # ---- reading

    def directions(self) -> dict[str, Float[Tensor, "v *shape"]]:
        """{parameter: (n_directions, *shape)}: the decoder's directions, of unit norm over all tensors together."""
        return {name: self.decoder.dense(name) for name in self.decoder.shapes}

    def encode(self, inputs: Inputs, seed: int = 0, *, sparse: bool = False) -> Float[Tensor, "n v"]:
        """Coefficients z = ⟨g, u⟩ of every sample, signed, with references drawn from the seed.

        With ``sparse`` those below the fit's threshold are zero, as the rebuilding uses them.
        """
        z = torch.cat([g.inner(self.encoder) for g in self.gradients(inputs, 1, seed)])
        return self.settings.sparsity.keep(z, self.threshold) if sparse else z

    def activation(self, inputs: Inputs) -> Float[Tensor, "n v"]:
        """a = √(uᵀHu): how far the output moves for a unit step along each direction. Needs no reference."""
        return torch.cat(list(self._activations(inputs)))

    def impact(self, inputs: Inputs, references: int = 16, seed: int = 0) -> Float[Tensor, "n v"]:
        """Mean |z| over ``references`` drawn references."""
        return torch.cat(list(self._impacts(inputs, references, seed)))

    def top(self, inputs: Inputs, k: int = 20, by: str = "impact") -> tuple[Float[Tensor, "v k"], Int[Tensor, "v k"]]:
        """The k samples that use each direction most, by ``"impact"`` or ``"activation"``: strengths and indices.

        Inputs are read a few at a time and only the best are held, so a dataset may be larger than memory. With fewer
        than k samples there are fewer columns.
        """
        choice("by", by, "impact", "activation")
        whole("k", k)
        return strongest(self._impacts(inputs) if by == "impact" else self._activations(inputs), k)

    def _activations(self, inputs: Inputs) -> Iterator[Float[Tensor, "n v"]]:
        for some in pieces(self.target, inputs):
            yield curvatures(self.target, self.settings.divergence, self.decoder, some, self.captured(some)).sqrt()

    def _impacts(self, inputs: Inputs, references: int = 16, seed: int = 0) -> Iterator[Float[Tensor, "n v"]]:
        whole("references", references)
        draws = 1 if self.settings.reference.fixed else references
        for g in self.gradients(inputs, draws, seed):
            yield g.inner(self.encoder).abs().unflatten(0, (-1, draws)).mean(1)

    def reconstruction_error(self, inputs: Inputs, seed: int = 0) -> float:
        """Σ‖g − ĝ‖² / Σ‖g‖² with the stored threshold (eq. 7)."""
        gram, left, total = self.decoder.gram(), 0.0, 0.0
        for g in self.gradients(inputs, 1, seed):
            z = g.inner(self.encoder)
            y = z if self.settings.tied else g.inner(self.decoder)
            squares, s = g.square_norms(), self.settings.sparsity.keep(z, self.threshold)
            left += squared_error(squares, s, y, gram).item()
            total += squares.sum().item()
        if not total > 0:
            raise ValueError("every gradient is zero on these inputs, so the error is not defined")
        return left / total

    @torch.no_grad()
    def gradients(self, inputs: Inputs, draws: int, seed: int) -> Iterator[Gradients]:
        """Gradients of the samples, a few examples at a time; references are drawn in the samples' order."""
        noise = generator(seed, "encode")
        for some in pieces(self.target, inputs, draws):
            shape = len(some[0]), self.target.outputs(first(some, 1)).shape[1]
            s = self.settings
            yield self._prepared(some).source(some, Draws.of(s.reference, s.divergence, self.pool, shape, draws, noise))

    def captured(self, examples: Examples) -> CapturedSource:
        """Where gradients of whole outputs come from."""
        return self._prepared(examples).outputs

    def _prepared(self, examples: Examples) -> Samples:
        """Where gradients come from, prepared on the first examples that are asked about."""
        if self._samples is None or self.target.renewed():
            self._samples = SAMPLES[self.settings.samples](self.target, examples, self.settings)
        return self._samples

    # ---- acting

    @contextmanager
    def perturbed(self, steps: Mapping[int, float]) -> Iterator[nn.Module]:
        """Inside, the model runs with w + Σ δ u; afterwards it is bit for bit what it was, whatever happened."""
        few, sizes = self.moving(steps)
        with moved(self.target.chosen, {name: torch.tensordot(sizes, few.dense(name), 1) for name in few.shapes}):
            yield self.target.model

    def moving(self, steps: Mapping[int, float]) -> tuple[Directions, Float[Tensor, " few"]]:
        """The directions that steps are taken along, and the steps; ValueError for one that cannot be taken."""
        for number, delta in steps.items():
            whole("direction", number, 0, self.decoder.n - 1)
            real(f"the step along direction {number}", delta)
        sizes = torch.tensor(list(steps.values()), dtype=self.target.dtype, device=self.target.device)
        return self.decoder.select(list(steps)), sizes


def decompose(
    model: nn.Module,
    inputs: Inputs,
    *,
    divergence: Divergence | None = None,
    reference: Reference | None = None,
    parameters: Sequence[str] = ("*",),
    n_directions: int = 5,
    rank: int = 1,
    factorization: Factorization = "cp",
    tied: bool = False,
    sparsity: Sparsity | None = None,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    seed: int = 0,
    samples: Literal["outputs", "uses"] = "outputs",
    scale: Literal["unit"] | None = None,
    group: Mapping[str, str] | None = None,
    prune: float | None = None,
    restarts: int = 1,
    start: Literal["random", "samples"] = "random",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
) -> Decomposition:
    """Learn directions in a model's parameter space that rebuild its per-sample gradients.

    Args:
        model: any module, in evaluation mode. Its parameters are read, never changed.
        inputs: a tensor, a tuple or mapping of tensors passed to the model together, or a data set of such examples;
            the first axis counts examples.
        divergence: how outputs are compared; :class:`SquaredError` by default.
        reference: what a sample is compared with; :class:`OtherSample` by default, for uses :class:`Mean`, which under
            KL is the same without the noise of a draw.
        parameters: glob patterns over the names in ``model.named_parameters()``.
        n_directions: size of the dictionary.
        rank: rank of each direction in each tensor.
        factorization: ``"cp"`` or ``"tucker"``.
        tied: one set of directions for reading and writing, instead of two.
        sparsity: :class:`BatchTopK` (10% by default) or :class:`L1`.
        batch_size: samples in a step; an example with positions counts once for each.
        samples: whose gradients are rebuilt: each output's, over all uses of a weight (``"outputs"``), or each single
            use's, over all outputs (``"uses"``), where a use is a position or patch at which a weight multiplies.
            ``encode`` and the rest then count samples example by example, position by position.
        scale: ``"unit"`` scales the gradients of uses to norm one, so that all count alike.
        group: axes of a tensor that share one factor, by pattern, as einops writes them:
            ``{"*.W_[QKV]": "head d_model d_head -> (head d_head) d_model"}`` lets rank one mean a matrix of rank one.
        prune: after the fit a direction is left out while the training error grows by less than this share of ‖g‖²;
            ``history.pruned`` has their numbers. Well below 1 / n_directions where all are in use.
        restarts: of so many fits, run at once on the same gradients from starts of their own, the one with the lowest
            training error is kept; ``history.restarts`` has the errors of all.
        start: ``"random"``, or ``"samples"``: at gradients unlike each other, chosen as by k-means++. Small
            or rare ones then keep a direction more often.
        checkpoint: a path that is written as the fit goes on, and resumed from where it is there.
        checkpoint_seconds: time between two writes, at least; longer where a write takes more than 1/40 of it.

    Raises:
        ValueError: for anything that cannot be handled, before work starts.
    """
    settings = Settings(
        SquaredError() if divergence is None else divergence,
        (Mean() if samples == "uses" else OtherSample()) if reference is None else reference,
        patterns(parameters), n_directions, rank, factorization, tied, BatchTopK(0.1) if sparsity is None else sparsity,
        steps, batch_size, learning_rate, seed, samples, scale, group=group, prune=prune, restarts=restarts,
        start=start,
    )  # fmt: skip
    real("checkpoint_seconds", checkpoint_seconds, least=0)
    path = None if checkpoint is None else files.writable(checkpoint)
    return fitted(model, inputs, settings, progress, path, checkpoint_seconds)


def fitted(
    model: nn.Module, inputs: Inputs, settings: Settings, progress: bool, path: Path | None, seconds: float
) -> Decomposition:
    """Fit; once more from the start, by autograd, if factored gradients turn out to be wrong on the way."""
    target = Target(model, settings.parameters, settings.group)
    check_rank(target.shapes, settings.rank, settings.factorization)
    data, kept = Data.read(target, inputs, settings), None
    if path is not None:
        kept = Checkpoint(path, identity(target, settings, data.seen, data.count), seconds)
    gradients = SAMPLES[settings.samples](target, data.probe, settings)
    while True:
        try:
            batches = gradients.batches(data, generator(settings.seed, "data"))
            u = fit(target, batches, settings, progress=progress, checkpoint=kept)
            parts = u.encoder, u.decoder, u.threshold, data.draws.pool, u.history, data.seen, gradients
            return Decomposition(target, settings, *parts)
        except Mistaken:
            if parallel.processes() > 1:  # the others would wait for this one
                raise ValueError("earlier gradients were not autograd's; run this fit in one process") from None
            aside = kept and kept.set_aside()
            told = f"; its checkpoint is at {str(aside)!r}" if aside else ""
            log.warning("earlier gradients were not autograd's: the fit starts again with autograd's%s", told)


@torch.no_grad()
def interactions(d: Decomposition, inputs: Inputs) -> Float[Tensor, "v v"]:
    """The normalised cross-curvature of every pair, E[u_aᵀ H u_b] / √(E[u_aᵀ H u_a] E[u_bᵀ H u_b]), in [−1, 1].

    E is the mean over samples, so the diagonal is one: the cosine, over all samples together, between what two
    directions do to the output. Directions that never move the output have zero rows.
    """
    total = torch.zeros(d.decoder.n, d.decoder.n, dtype=d.target.dtype, device=d.target.device)
    for some in chunks(as_examples(inputs), CHUNK):
        y = push_forward(d.target, d.settings.divergence, d.decoder, some)
        total += torch.einsum("nvk,nwk->vw", y, y)
    scale = total.diagonal().sqrt()
    return torch.where(scale.outer(scale) > 0, total / scale.outer(scale), torch.zeros_like(total))
