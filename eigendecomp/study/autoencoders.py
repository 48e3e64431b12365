"""Sparse autoencoders to compare with: sae-lens on activations held in memory, offline, from a seed.

sae-lens is imported when it is needed (pip install "eigendecomp[study]"); it takes seconds to import.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from eigendecomp.support.checks import choice
from eigendecomp.support.random import generator

NORM_BATCHES = 10  # from whose rows the common norm is taken


class Autoencoder:
    """A trained SAE: what it reads from activations, what it rebuilds, and the model steered along its units."""

    def __init__(self, sae: Any) -> None:
        self.sae = sae

    @property
    def decoder(self) -> Float[Tensor, "units d"]:
        """What each unit writes."""
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def encode(self, activations: Float[Tensor, "n d"]) -> Float[Tensor, "n units"]:
        """Each unit's activation, zero where it is off."""
        return self.sae.encode(activations)

    @torch.no_grad()
    def before_threshold(self, activations: Float[Tensor, "n d"]) -> Float[Tensor, "n units"]:
        """What the encoder reads before anything is set to zero: it ranks also the samples on which a unit is off."""
        centred = activations - self.sae.b_dec if self.sae.cfg.apply_b_dec_to_input else activations
        return centred @ self.sae.W_enc + self.sae.b_enc

    @torch.no_grad()
    def reconstruction_error(self, activations: Float[Tensor, "n d"]) -> float:
        """Σ‖a − â‖² / Σ‖a − ā‖²: the share of the activations' variance that is lost."""
        left = self.sae.decode(self.sae.encode(activations)) - activations
        return (left.square().sum() / (activations - activations.mean(0)).square().sum()).item()

    @contextmanager
    def steered(
        self,
        model: nn.Module,
        module: str,
        steps: dict[int, float],
        *,
        how: Literal["add", "scale"] = "add",
        axis: int = -1,
    ) -> Iterator[nn.Module]:
        """Inside, the output of ``module`` has δ · (the unit's row) added to it, along ``axis`` (1 for a convolution).

        ``"add"`` does so on every sample; ``"scale"`` only where the unit is on, and δ times its activation: the
        unit's own part of the activation grows by the factor 1 + δ.
        """
        units = list(steps)
        sizes = torch.tensor([float(steps[unit]) for unit in units])

        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            x = output.movedim(axis, -1)
            z = self.encode(x)[..., units] if how == "scale" else torch.ones(*x.shape[:-1], len(units))
            return output + ((z * sizes) @ self.decoder[units]).movedim(-1, axis)

        handle = model.get_submodule(module).register_forward_hook(hook)
        try:
            yield model
        finally:
            handle.remove()


@torch.enable_grad()
def train(
    activations: Float[Tensor, "n d"],
    units: int,
    kept: float,
    *,
    seed: int,
    kind: Literal["batchtopk", "topk"] = "batchtopk",
    steps: int = 2000,
    batch_size: int = 1024,
    learning_rate: float = 3e-3,
    progress: bool = False,
) -> Autoencoder:
    """Train an SAE with ``kept`` units on in a sample: on average over a batch, or (``"topk"``) in every one.

    Activations are scaled to a common norm for training and the scale is folded back into the weights.

    Raises:
        ValueError: if the activations are not finite rows, or no such SAE can be built.
    """
    check(activations, units, kept, kind)
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    size = {"d_in": activations.shape[1], "d_sae": units, "normalize_activations": "expected_average_only_in"}
    settings = SAETrainerConfig(
        total_training_samples=steps * batch_size, train_batch_size_samples=batch_size, lr=learning_rate,
        lr_end=0.0, lr_decay_steps=steps // 2, dead_feature_window=100,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "batchtopk":
            model = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(k=kept, **size))  # type: ignore
            model.activation_fn.forward = lambda x: largest(kept, x)  # type: ignore
        else:
            model = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(k=int(kept), **size))  # type: ignore
        draws = repeat(generator(seed, "sae"))
        data = (activations[torch.randint(len(activations), (batch_size,), generator=draw)] for draw in draws)
        optimise(SAETrainer(settings, model, data), data, steps, progress)
        with TemporaryDirectory() as folder:  # the library's own way from the training form to the other
            model.save_inference_model(folder)
            return Autoencoder(sae_lens.SAE.load_from_disk(folder).eval())


def largest(kept: float, x: Float[Tensor, "n units"]) -> Float[Tensor, "n units"]:
    """The library's BatchTopK activation, bit for bit, by a partition: its sort took half of the training."""
    place = x.numel() - max(1, int(kept * len(x)))
    least = np.partition(x.detach().flatten().numpy(), place)[place]
    return F.threshold(x, max(0.0, float(np.nextafter(least, -np.inf))), 0.0)  # `least` itself is kept


def check(activations: Tensor, units: int, kept: float, kind: str) -> None:
    """Raises ValueError where :func:`train` cannot be asked for this."""
    if activations.ndim != 2 or not activations.isfinite().all():
        raise ValueError(f"activations {tuple(activations.shape)} must be finite rows, one a sample")
    choice("kind", kind, "batchtopk", "topk")
    if not 0 < kept <= units:
        raise ValueError(f"kept={kept} must be positive and at most units={units}")
    if kind == "topk" and kept != int(kept):
        raise ValueError(f"kept={kept} must be whole for kind='topk', which keeps as many in every sample")


def optimise(trainer: Any, data: Iterator[Tensor], steps: int, progress: bool) -> None:
    """All steps of a sae-lens trainer, as its own ``fit`` takes them, with a progress bar that can be left out."""
    total = sum(next(data).norm(dim=-1).float().sum().item() for _ in range(NORM_BATCHES))
    mean = total / (NORM_BATCHES * trainer.cfg.train_batch_size_samples)
    trainer.activation_scaler.scaling_factor = trainer.sae.cfg.d_in**0.5 / mean
    for _ in tqdm(range(steps), disable=not progress, desc="autoencoder"):
        trainer.maybe_reset_sparsity()
        trainer.step(next(data))
        trainer.n_training_steps += 1
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
