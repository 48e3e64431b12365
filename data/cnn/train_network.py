"""Train the shipped network for Fashion-MNIST: ``python data/cnn/train_network.py``, about ten minutes on one core."""

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion.network import (
    CHECKPOINT,
    TRAIN_COMMAND,
    FashionCNN,
    accuracy,
    predict,
    split_indices,
    untrained,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How the network is trained; the defaults made the shipped one. Change them by the held-out images."""

    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 2
    held_out: int = 5000
    widths: tuple[int, int, int] = (16, 32, 64)


def augment(images: Float[Tensor, "n 1 h w"], shift: int, generator: torch.Generator) -> Float[Tensor, "n 1 h w"]:
    """The images, each flipped left to right or not, and moved by up to ``shift`` pixels on either axis."""
    n, _, height, width = images.shape
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(height) + dy, torch.arange(width) + dx
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images[:, 0], (shift,) * 4)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def optimiser(model: nn.Module, settings: Settings) -> torch.optim.SGD:
    """Nesterov's momentum; weights decay, biases and normalisations do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.SGD(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=True,
    )


def train(
    images: Float[Tensor, "n 1 28 28"],
    labels: Int[Tensor, " n"],
    seed: int = 0,
    settings: Settings | None = None,
    progress: bool = False,
) -> tuple[FashionCNN, list[dict[str, float]]]:
    """Train a network; returns it in eval mode, and per epoch its training loss and its held-out accuracy.

    Stochastic gradient descent with Nesterov momentum and a one-cycle learning rate. ``settings.held_out`` of
    the images, drawn from the seed, are never trained on. Raises ValueError as ``split_indices``.
    """
    settings = settings or Settings()
    kept, held = split_indices(len(images), settings.held_out, seed)
    generator = torch.Generator().manual_seed(seed)
    model = untrained(settings.widths, seed).to(memory_format=torch.channels_last)
    optimizer = optimiser(model, settings)
    batches = max(1, len(kept) // settings.batch_size)
    total_steps = settings.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps, pct_start=0.25)
    history = []
    for epoch in range(settings.epochs):
        model.train()
        total, order = 0.0, kept[torch.randperm(len(kept), generator=generator)]
        for index in order.split(settings.batch_size)[:batches]:
            batch = augment(images[index], settings.shift, generator)
            loss = F.cross_entropy(model(batch.contiguous(memory_format=torch.channels_last)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        model.eval()
        row = {"epoch": epoch + 1, "loss": total / batches}
        if len(held):
            row["held_out_accuracy"] = accuracy(model, images[held], labels[held])
        history.append(row)
        if progress:
            print(*(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return model.to(memory_format=torch.contiguous_format), history


def save_model(model: FashionCNN, path: str | Path = CHECKPOINT) -> None:
    """Write the network's parameters and normalisation statistics as safetensors."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=Settings().epochs)
    parser.add_argument("--root", help="holds FashionMNIST/raw (default: EIGENDECOMP_DATA or data/downloads)")
    parser.add_argument("--threads", type=int, default=1, help="more are slower on a machine with other work")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="training.json goes beside it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Write the checkpoint and its record beside it."""
    chosen = parsed(arguments)
    torch.set_num_threads(chosen.threads)
    settings = Settings(epochs=chosen.epochs)
    try:
        images, labels = fashion.load("train", chosen.root)
        test_images, test_labels = fashion.load("test", chosen.root)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    start = time.perf_counter()
    model, history = train(images, labels, chosen.seed, settings, progress=True)
    seconds = time.perf_counter() - start
    save_model(model, chosen.output)
    right = (predict(model, test_images).argmax(1) == test_labels).double()
    record = {
        "command": f"{TRAIN_COMMAND} --seed {chosen.seed} --epochs {chosen.epochs}",
        "settings": asdict(settings),
        "seed": chosen.seed,
        "threads": chosen.threads,
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_sha256": hashlib.sha256(chosen.output.read_bytes()).hexdigest(),
        "held_out_accuracy": history[-1].get("held_out_accuracy"),
        "test_accuracy": right.mean().item(),
        "test_accuracy_by_class": {
            name: right[test_labels == label].mean().item() for label, name in enumerate(fashion.CLASSES)
        },
        "history": history,
    }
    chosen.output.with_name("training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"test accuracy {record['test_accuracy']:.4f}, {seconds:.0f} s, {chosen.output}")


if __name__ == "__main__":
    main()
