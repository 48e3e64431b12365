"""The public door: decompose a model, and what one then asks of its directions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eigendecomp.batches import CACHE_BYTES, ZERO, CachedBatches, LiveBatches
from eigendecomp.curvature import curvatures, push_forward
from eigendecomp.directions import Directions, Factorization
from eigendecomp.divergence import Divergence, SquaredError
from eigendecomp.factored.source import CapturedSource
from eigendecomp.fit import fit
from eigendecomp.gradients import Gradients
from eigendecomp.objective import squared_error
from eigendecomp.reference import Draws, OtherSample, Reference
from eigendecomp.settings import History, Settings, settings_from
from eigendecomp.sparsity import BatchTopK, Sparsity
from eigendecomp.storage import Checkpoint, check_target, fingerprint, pack, unpack
from eigendecomp.support import files, parallel
from eigendecomp.support.checks import real, whole
from eigendecomp.support.examples import Examples, Inputs, as_examples, chunks, count, feed, fetch, first
from eigendecomp.support.random import generator
from eigendecomp.target import LOCK, Target, patterns

FORMAT = 1
CHUNK = 64  # examples read at a time; a constant, so that nothing depends on it
POOL_SAMPLES = 8192  # samples from whose outputs references are made, where there are more


def capture(target: Target, examples: Examples, settings: Settings) -> CapturedSource:
    """The gradients of a target, arranged for this many directions."""
    return CapturedSource(target, examples, terms=settings.n_directions * settings.rank)


class Decomposition:
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
    ) -> None:
        self.target, self.settings = target, settings
        self.encoder, self.decoder, self.threshold, self.pool = encoder, decoder, threshold, pool
        self.history = history
        self._source: CapturedSource | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the source, which belongs to this process and is prepared again when it is needed."""
        return self.__dict__ | {"_source": None}

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
            source = self.source(part)
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

    def source(self, examples: Examples) -> CapturedSource:
        """Where gradients come from, prepared on the first examples that are asked about."""
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
        """Write the directions as safetensors with the settings as metadata."""
        tensors = {"pool": self.pool, **pack("decoder", self.decoder)}
        if not self.settings.tied:
            tensors |= pack("encoder", self.encoder)
        metadata = {
            "format": FORMAT,
            "settings": self.settings.as_json(),
            "shapes": self.decoder.shapes,
            "target": fingerprint(self.target),
            "threshold": self.threshold,
            "history": asdict(self.history),
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
            target = Target(model, settings.parameters)
            check_target(target, metadata, path)
            decoder = unpack("decoder", tensors, target, settings)
            encoder = decoder if settings.tied else unpack("encoder", tensors, target, settings)
            history = History.read(metadata["history"])
            threshold = metadata["threshold"]
            if threshold is not None:
                real("threshold", threshold, least=0)
            return cls(target, settings, encoder, decoder, threshold, tensors["pool"].to(target.device), history)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} holds other metadata than a decomposition's ({error!r})") from None

    # ---- showing

    def browse(self, inputs: Inputs, path: str | Path, **options: Any) -> Path:
        """Write one HTML file to look at the directions on these inputs; see :mod:`eigendecomp.page`."""
        from eigendecomp.page.collect import browse  # which knows this module

        return browse(self, inputs, path, **options)

    # ---- handing on

    def edit(self, steps: Mapping[int, float]) -> nn.Module:
        """A copy of the model with w + Σ δ u, to keep; see :mod:`eigendecomp.share.edits`."""
        from eigendecomp.share.edits import edited

        return edited(self, steps)

    def to_lora(self, steps: Mapping[int, float], path: str | Path) -> Path:
        """Write the edit as an adapter that peft reads; see :mod:`eigendecomp.share.lora`."""
        from eigendecomp.share.lora import to_lora

        return to_lora(self, steps, path)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a folder with the file and a card, laid out for the hub; see :mod:`eigendecomp.share.hub`."""
        from eigendecomp.share.hub import save_pretrained

        return save_pretrained(self, folder)

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Upload such a folder to the Hugging Face hub and return its address."""
        from eigendecomp.share.hub import push_to_hub

        return push_to_hub(self, repo, **options)

    @classmethod
    def from_pretrained(cls, repo_or_folder: str | Path, model: nn.Module, **options: Any) -> "Decomposition":
        """:meth:`load` from such a folder, here or on the hub."""
        from eigendecomp.share.hub import find

        return cls.load(find(repo_or_folder, **options), model)

    def readout(self, unembedding: Float[Tensor, "vocabulary width"], k: int = 10, names: Any = None, **options: Any):
        """The vocabulary items that factors read and write; see :mod:`eigendecomp.share.readout`."""
        from eigendecomp.share.readout import readout

        return readout(self, unembedding, k, names, **options)

    def explain(self, path: str | Path, inputs: Inputs, names: Any = None, **options: Any) -> Path:
        """Write JSON lines from which to label the directions; see :mod:`eigendecomp.share.explain`."""
        from eigendecomp.share.explain import explain

        return explain(self, path, inputs, names, **options)


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
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
) -> Decomposition:
    """Learn directions in a model's parameter space that rebuild its per-sample gradients.

    Args:
        model: any module, in evaluation mode. Its parameters are read, never changed.
        inputs: a tensor, or a tuple of tensors passed to the model together; the first axis counts examples.
        divergence: how outputs are compared; :class:`SquaredError` by default.
        reference: what a sample is compared with; :class:`OtherSample` by default.
        parameters: glob patterns over the names in ``model.named_parameters()``.
        n_directions: size of the dictionary.
        rank: rank of each direction in each tensor.
        factorization: ``"cp"`` or ``"tucker"``.
        tied: one set of rows for reading and writing, instead of two.
        sparsity: :class:`BatchTopK` (10% by default) or :class:`L1`.
        batch_size: samples in a step; an example with positions counts once for each.
        checkpoint: a path that is written as the fit goes on, and resumed from where it is there.
        checkpoint_seconds: time between two writes, at least; longer where a write takes more than 1/40 of it.

    Raises:
        ValueError: for anything that cannot be handled, before work starts.
    """
    divergence = SquaredError() if divergence is None else divergence
    reference = OtherSample() if reference is None else reference
    sparsity = BatchTopK(0.1) if sparsity is None else sparsity
    settings = Settings(
        divergence, reference, patterns(parameters), n_directions, rank,
        factorization, tied, sparsity, steps, batch_size, learning_rate, seed,
    )  # fmt: skip
    checkpoint = None if checkpoint is None else files.writable(checkpoint)
    real("checkpoint_seconds", checkpoint_seconds, least=0)
    probe = first(inputs, 3)
    target = Target(model, settings.parameters)
    Directions.random(target.shapes, 1, rank, factorization)  # refuses a rank of no use before any work
    f = target.outputs(probe)
    divergence.check(f.shape[-1])
    source = capture(target, probe, settings)
    n, positions = count(inputs), f.shape[1]
    cached = n is not None and CachedBatches.size(f, n, reference, target) <= CACHE_BYTES
    # The pool is read from every sample where that is cheap, and else from some that are drawn.
    some = math.ceil(POOL_SAMPLES / positions)
    everything = n is not None and (cached or n <= some)
    held = fetch(inputs, range(n)) if everything and n else feed(inputs, generator(seed, "pool")).take(some)
    f = target.outputs(held)
    pool = reference.prepare(divergence, divergence.predict(f.flatten(0, 1)), generator(seed, "pool"))
    draws = Draws.of(reference, divergence, pool, (1, 1), 1, generator(seed, "probe"))
    check_differs(draws, f, generator(seed, "zero"))
    if cached:
        batches = CachedBatches(source, held, f, draws, generator(seed, "data"))
    else:
        batches = LiveBatches(source, feed(inputs, generator(seed, "data")), draws, positions)
    identity = {
        "settings": settings.as_json(),
        "target": fingerprint(target),
        "precision": str(parallel.precision() or target.dtype),
        "data": files.checksum({str(number): tensor for number, tensor in enumerate(held)}, f"{n} examples"),
    }
    keeper = None if checkpoint is None else Checkpoint(checkpoint, identity, checkpoint_seconds)
    found = fit(target, batches, settings, progress=progress, checkpoint=keeper)
    made = Decomposition(target, settings, found.encoder, found.decoder, found.threshold, pool, found.history)
    made._source = source
    return made


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
