"""The public door: decompose a model, and what one then asks of its directions."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigendecomp.batches import CACHE_BYTES, ZERO, Batches, CachedBatches, LiveBatches
from eigendecomp.curvature import curvatures, push_forward
from eigendecomp.directions import Directions, Factorization, check_rank
from eigendecomp.divergence import Divergence, SquaredError
from eigendecomp.factored.guard import Mistaken
from eigendecomp.factored.source import CapturedSource
from eigendecomp.factored.uses import HELD_BYTES, HeldUses, UseSource
from eigendecomp.fit import fit
from eigendecomp.gradients import Gradients
from eigendecomp.objective import squared_error
from eigendecomp.reference import Draws, Mean, OtherSample, Reference
from eigendecomp.settings import History, Settings, settings_from
from eigendecomp.sparsity import BatchTopK, Sparsity
from eigendecomp.storage import Checkpoint, check_target, fingerprint, pack, pack_pool, unpack, unpack_seen
from eigendecomp.support import files, parallel
from eigendecomp.support.checks import real, whole
from eigendecomp.support.doors import Doors
from eigendecomp.support.examples import Examples, Inputs, Named, as_examples, chunks, count, feed, fetch, first
from eigendecomp.support.models import LOCK
from eigendecomp.support.random import generator
from eigendecomp.support.show import Shown
from eigendecomp.target import Target, patterns

log = logging.getLogger(__name__)

FORMAT = 1
CHUNK = 64  # examples read at a time; a constant, so that nothing depends on it
POOL_SAMPLES = 8192  # samples from whose outputs references are made, where there are more


def capture(target: Target, examples: Examples, settings: Settings) -> CapturedSource | UseSource:
    """The gradients of the samples that are chosen, arranged for this many directions."""
    whole = settings.samples == "outputs"
    captured = CapturedSource(target, examples, terms=settings.n_directions * settings.rank, form=whole)
    return captured if whole else UseSource(captured, examples, settings.scale == "unit")


class Decomposition(Shown, Doors):
    """Directions learned for a target, with all that is needed to read new samples along them."""

    def __init__(
        self,
        target: Target,
        settings: Settings,
        encoder: Directions,
        decoder: Directions,
        threshold: float | None,
        pool: Float[Tensor, "m k"],
        history: History,
        seen: Examples = (),
    ) -> None:
        self.target, self.settings = target, settings
        self.encoder, self.decoder, self.threshold, self.pool = encoder, decoder, threshold, pool
        self.history = history
        self.seen = seen  # the examples that the pool was made from, if they are known
        self._source: CapturedSource | UseSource | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the source, which belongs to this process and is prepared again when it is needed."""
        return self.__dict__ | {"_source": None}

    def summary(self) -> list[tuple[str, str]]:
        """The shapes, what the fit was asked for, and what became of it."""
        s, shapes = self.settings, ", ".join(f"{name} {shape}" for name, shape in self.decoder.shapes.items())
        asked = f"{s.divergence}, {s.reference}, samples={s.samples!r}, {s.sparsity}"
        return [
            ("directions", f"{self.decoder.n} of rank {s.rank} ({s.factorization}{', tied' if s.tied else ''})"),
            ("parameters", shapes), ("rebuilding", asked), *self.history.summary(),
        ]  # fmt: skip

    # ---- reading

    def directions(self) -> dict[str, Float[Tensor, "v *shape"]]:
        """{parameter: (n_directions, *shape)}: the decoder rows, of unit norm over all tensors together."""
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

    def top(
        self, inputs: Inputs, k: int = 20, by: str = "impact", *, references: int = 16, seed: int = 0
    ) -> tuple[Float[Tensor, "v k"], Int[Tensor, "v k"]]:
        """The k samples that use each direction most, by ``"impact"`` or ``"activation"``: strengths and indices.

        Inputs are read a few at a time and only the best are held, so a dataset may be larger than memory. With fewer
        than k samples there are fewer columns.
        """
        if by not in ("impact", "activation"):
            raise ValueError(f"by={by!r} must be 'impact' or 'activation'")
        whole("k", k)
        values = self.decoder.norms().new_zeros(self.decoder.n, 0)
        rows, seen = values.long(), 0
        for part in self._impacts(inputs, references, seed) if by == "impact" else self._activations(inputs):
            index = torch.arange(seen, seen + len(part), device=part.device).expand(self.decoder.n, -1)
            seen += len(part)
            values, rows = torch.cat([values, part.T], 1), torch.cat([rows, index], 1)
            values, order = values.topk(min(k, seen), 1)
            rows = rows.gather(1, order)
        return values, rows

    def _activations(self, inputs: Inputs) -> Iterator[Float[Tensor, "n v"]]:
        for part in chunks(inputs, CHUNK):
            source = self.captured(part)
            yield curvatures(self.target, self.settings.divergence, self.decoder, part, source=source).sqrt()

    def _impacts(self, inputs: Inputs, references: int, seed: int) -> Iterator[Float[Tensor, "n v"]]:
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
        """Gradients of the samples, ``CHUNK`` examples at a time; references are drawn in the samples' order."""
        noise = generator(seed, "encode")
        for part in chunks(inputs, CHUNK):
            positions = self.target.outputs(first(part, 1)).shape[1]
            shape = len(part[0]), positions
            s = self.settings
            yield self.source(part)(part, Draws.of(s.reference, s.divergence, self.pool, shape, draws, noise))

    def captured(self, examples: Examples) -> CapturedSource:
        """Where gradients of whole outputs come from."""
        source = self.source(examples)
        return source.captured if isinstance(source, UseSource) else source

    def source(self, examples: Examples) -> CapturedSource | UseSource:
        """Where the samples' gradients come from, prepared on the first examples that are asked about."""
        if self._source is None or self.target.renewed():
            self._source = capture(self.target, examples, self.settings)
        return self._source

    # ---- acting

    @contextmanager
    def perturbed(self, steps: Mapping[int, float]) -> Iterator[nn.Module]:
        """Inside, the model runs with w + Σ δ u; afterwards it is bit for bit what it was, whatever happened."""
        for number, delta in steps.items():
            whole("direction", number, 0, self.decoder.n - 1)
            real(f"the step along direction {number}", delta)
        few = self.decoder.select([int(number) for number in steps])
        sizes = torch.tensor(list(steps.values()), dtype=self.target.dtype, device=self.target.device)
        with LOCK:  # no other thread runs a model that is moved
            chosen = self.target.chosen
            kept = {name: p.detach().clone() for name, p in chosen.items()}
            try:
                with torch.no_grad():
                    for name, p in chosen.items():
                        p.add_(torch.tensordot(sizes, few.dense(name), 1).view(p.shape))
                yield self.target.model
            finally:
                with torch.no_grad():
                    for name, p in chosen.items():
                        p.copy_(kept[name])

    # ---- keeping

    def save(self, path: str | Path) -> None:
        """Write the directions as safetensors with the settings as metadata.

        A pool of references above 4 MiB is written as the inputs it came from, if these are smaller: mind who reads it.
        """
        tensors = {**pack_pool(self.pool, self.seen), **pack("decoder", self.decoder)}
        if not self.settings.tied:
            tensors |= pack("encoder", self.encoder)
        metadata = {
            "format": FORMAT,
            "settings": self.settings.as_json(),
            "shapes": self.decoder.shapes,
            "target": fingerprint(self.target),
            "threshold": self.threshold,
            "history": asdict(self.history),
            "arguments": list(self.seen.names) if isinstance(self.seen, Named) else None,
        }
        files.write(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> "Decomposition":
        """Read what :meth:`save` wrote; nothing in the file is ever run.

        Raises:
            ValueError: if the file is not a decomposition, is damaged, or is one of another model.
        """
        tensors, metadata = files.read(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is not a decomposition that this version reads (format {FORMAT})")
        try:
            settings = settings_from(metadata["settings"])
            target = Target(model, settings.parameters, settings.group)
            check_target(target, metadata, path)
            history = History.read(metadata["history"])
            decoder = unpack("decoder", tensors, target, settings, history)
            encoder = decoder if settings.tied else unpack("encoder", tensors, target, settings, history)
            threshold = metadata["threshold"]
            if threshold is not None:
                real("threshold", threshold, least=0)
            seen = unpack_seen(tensors, metadata.get("arguments"))
            pool = pool_of(target, seen, settings)[1] if seen else tensors["pool"].to(target.device)
            return cls(target, settings, encoder, decoder, threshold, pool, history, seen)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} holds other metadata than a decomposition's ({error!r})") from None


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
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
) -> Decomposition:
    """Learn directions in a model's parameter space that rebuild its per-sample gradients.

    Args:
        model: any module, in evaluation mode. Its parameters are read, never changed.
        inputs: a tensor, or a tuple of tensors passed to the model together; the first axis counts examples.
        divergence: how outputs are compared; :class:`SquaredError` by default.
        reference: what a sample is compared with; :class:`OtherSample` by default, for uses :class:`Mean`, which under
            KL is the same without the noise of a draw.
        parameters: glob patterns over the names in ``model.named_parameters()``.
        n_directions: size of the dictionary.
        rank: rank of each direction in each tensor.
        factorization: ``"cp"`` or ``"tucker"``.
        tied: one set of rows for reading and writing, instead of two.
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
        checkpoint: a path that is written as the fit goes on, and resumed from where it is there.
        checkpoint_seconds: time between two writes, at least; longer where a write takes more than 1/40 of it.

    Raises:
        ValueError: for anything that cannot be handled, before work starts.
    """
    settings = Settings(
        SquaredError() if divergence is None else divergence,
        (Mean() if samples == "uses" else OtherSample()) if reference is None else reference,
        patterns(parameters), n_directions, rank, factorization, tied, BatchTopK(0.1) if sparsity is None else sparsity,
        steps, batch_size, learning_rate, seed, samples, scale,
        group=group, prune=prune, restarts=restarts,
    )  # fmt: skip
    path = None if checkpoint is None else files.writable(checkpoint)
    real("checkpoint_seconds", checkpoint_seconds, least=0)
    target = Target(model, settings.parameters, settings.group)
    check_rank(target.shapes, rank, factorization)
    data = Data.read(target, inputs, settings)
    source = capture(target, data.probe, settings)
    keeper = None if path is None else Checkpoint(path, identity(target, data, settings), checkpoint_seconds)
    while True:
        try:
            found = fit(target, data.batches(source, settings), settings, progress=progress, checkpoint=keeper)
            break
        except Mistaken:
            if parallel.processes() > 1:  # the others would wait for this one
                raise ValueError("earlier gradients were not autograd's; run this fit in one process") from None
            aside = keeper and keeper.set_aside()
            kept = f"; its checkpoint is at {str(aside)!r}" if aside else ""
            log.warning("earlier gradients were not autograd's: the fit starts again with autograd's%s", kept)
    made = Decomposition(
        target, settings, found.encoder, found.decoder, found.threshold, data.pool, found.history, data.seen
    )
    made._source = source
    return made


@dataclass
class Data:
    """What a fit reads of its inputs."""

    inputs: Inputs
    count: int | None  # examples, where that is known
    probe: Examples  # the first three
    seen: Examples  # those from whose outputs references are made: all, where that is cheap
    outputs: Float[Tensor, "e p k"]  # of these
    pool: Float[Tensor, "m k"]
    draws: Draws
    cached: bool  # whether Jacobians of all are small enough to be kept

    @classmethod
    def read(cls, target: Target, inputs: Inputs, settings: Settings) -> "Data":
        """Run the target on the inputs that references are made from.

        Raises:
            ValueError: if the divergence cannot compare the outputs, or no output differs from its reference.
        """
        s, probe = settings, first(inputs, 3)
        f = target.outputs(probe)
        s.divergence.check(f.shape[-1])
        n = count(inputs)
        cached = n is not None and CachedBatches.size(f, n, s.reference, target) <= CACHE_BYTES
        some = math.ceil(POOL_SAMPLES / f.shape[1])
        everything = n is not None and (cached or n <= some)
        seen = fetch(inputs, range(n)) if everything and n else feed(inputs, generator(s.seed, "pool")).take(some)
        f, pool = pool_of(target, seen, s)
        draws = Draws.of(s.reference, s.divergence, pool, (1, 1), 1, generator(s.seed, "probe"))
        check_differs(draws, f, generator(s.seed, "zero"))
        return cls(inputs, n, probe, seen, f, pool, draws, cached)

    def batches(self, source: CapturedSource | UseSource, settings: Settings) -> Batches:
        """Batches of gradients in the order that the seed gives, from the start."""
        order, positions = generator(settings.seed, "data"), self.outputs.shape[1]
        if isinstance(source, UseSource):
            if self.count and settings.reference.fixed and source.bytes(self.count) <= HELD_BYTES:
                return HeldUses(source, fetch(self.inputs, range(self.count)), self.draws, order)
            return LiveBatches(source, feed(self.inputs, order), self.draws, positions, source.positions)
        if self.cached:
            return CachedBatches(source, self.seen, self.outputs, self.draws, order)
        return LiveBatches(source, feed(self.inputs, order), self.draws, positions, positions)


def pool_of(target: Target, seen: Examples, settings: Settings) -> tuple[Float[Tensor, "e p k"], Float[Tensor, "m k"]]:
    """The outputs of examples, and what references are made of them."""
    f, predict = target.outputs(seen), settings.divergence.predict
    generated = generator(settings.seed, "pool")
    return f, settings.reference.prepare(settings.divergence, predict(f.flatten(0, 1)), generated)


def identity(target: Target, data: Data, settings: Settings) -> dict[str, Any]:
    """What a checkpoint must be a checkpoint of."""
    seen = {str(number): tensor for number, tensor in enumerate(data.seen)}
    return {
        "settings": settings.as_json(),
        "target": fingerprint(target),
        "precision": str(parallel.precision() or target.dtype),
        "data": files.checksum(seen, f"{data.count} examples"),
    }


def check_differs(draws: Draws, f: Float[Tensor, "e p k"], generator: torch.Generator) -> None:
    """Refuse references from which no output differs by more than rounding: a fit would learn the rounding.

    Raises:
        ValueError: if every cotangent is zero within 16 units of the outputs' last digit.
    """
    c = draws.again((f.shape[0], f.shape[1]), 1, generator)
    for start in range(0, len(f), 256):
        some = slice(start, start + 256)
        scale = f[some].abs().amax() + draws.divergence.predict(f[some]).abs().amax()
        if c[some](f[some]).abs().amax() > 16 * torch.finfo(f.dtype).eps * scale:
            return
    raise ValueError(f"all gradients are zero: {ZERO}")


@torch.no_grad()
def interactions(d: Decomposition, inputs: Inputs, *, chunk: int = 64) -> Float[Tensor, "v v"]:
    """The normalised cross-curvature of every pair, E[u_aᵀ H u_b] / √(E[u_aᵀ H u_a] E[u_bᵀ H u_b]), in [−1, 1].

    E is the mean over samples, so the diagonal is one: the cosine, over all samples together, between what two
    directions do to the output. Directions that never move the output have zero rows.
    """
    total: Tensor | float = 0.0
    for part in chunks(as_examples(inputs), chunk):
        moved = push_forward(d.target, d.settings.divergence, d.decoder, part)
        total = total + torch.einsum("nvk,nwk->vw", moved, moved)
    assert isinstance(total, Tensor)
    scale = total.diagonal().sqrt()
    return torch.where(scale.outer(scale) > 0, total / scale.outer(scale), torch.zeros_like(total))
