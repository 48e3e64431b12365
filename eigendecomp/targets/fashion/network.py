"""A residual network for Fashion-MNIST: the network, its training, the shipped checkpoint.

It has three stages of one residual block each; the pattern ``block2.*`` selects its middle block (two convolutions, two
normalisations, an identity skip; 14 × 14 positions), on which ``cnn_block`` reads and acts. It reads images in [0, 1],
as ``fashion.load`` returns them; its first normalisation standardises them.

    python -m eigendecomp.targets.fashion.network train      # about ten minutes on one core; data/cnn ships the result
"""

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.targets.fashion import images as fashion

CHECKPOINT = fashion.DATA / "cnn" / "fashion_cnn.safetensors"
RECORD = fashion.DATA / "cnn" / "training.json"
TRAIN_COMMAND = "python -m eigendecomp.targets.fashion.network train"


class ConvNorm(nn.Module):
    """Convolution (3 × 3, padded), batch normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return self.relu(self.bn(self.conv(x)))


class ResidualBlock(nn.Module):
    """``relu(x + bn2(conv2(relu(bn1(conv1(x))))))``, the shape of x kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.relu2(x + self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))


class FashionCNN(nn.Module):
    """Images (n, 1, 28, 28) in [0, 1] to logits (n, 10); ``widths``: the channels at 28, 14 and 7 pixels."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = ConvNorm(1, first)
        self.block1 = ResidualBlock(first)
        self.down1 = ConvNorm(first, second, stride=2)
        self.block2 = ResidualBlock(second)
        self.down2 = ConvNorm(second, third, stride=2)
        self.block3 = ResidualBlock(third)
        self.head = nn.Linear(third, len(fashion.CLASSES))

    def enter(self, images: Float[Tensor, "n 1 28 28"]) -> Float[Tensor, "n c 14 14"]:
        """What the middle block reads."""
        return self.down1(self.block1(self.stem(images)))

    def forward(self, images: Float[Tensor, "n 1 28 28"]) -> Float[Tensor, "n 10"]:
        x = self.block2(self.enter(images))
        x = self.block3(self.down2(x))
        return self.head(x.mean(dim=(2, 3)))


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


def split_indices(n: int, held_out: int, seed: int) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held_out"]]:
    """Indices to train on and indices held out, both in random order.

    Raises ValueError if ``held_out`` leaves nothing to train on.
    """
    if not 0 <= held_out < n:
        raise ValueError(f"held_out={held_out} must lie in 0 … {n - 1} for {n} images")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[held_out:], order[:held_out]


def augment(images: Float[Tensor, "n 1 h w"], shift: int, generator: torch.Generator) -> Float[Tensor, "n 1 h w"]:
    """The images, each flipped left to right or not, and moved by up to ``shift`` pixels on either axis."""
    n, _, height, width = images.shape
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(height) + dy, torch.arange(width) + dx
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images[:, 0], (shift,) * 4)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.no_grad()
def predict(model: nn.Module, images: Float[Tensor, "n c h w"], batch_size: int = 500) -> Float[Tensor, "n k"]:
    """The model's logits, batch by batch, without a graph; the model's mode is left as it is."""
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def accuracy(model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> float:
    """The share of images whose largest logit is their label's."""
    return (predict(model, images).argmax(1) == labels).double().mean().item()


def untrained(widths: tuple[int, int, int], seed: int) -> FashionCNN:
    """A network as it is drawn from the seed."""
    with torch.random.fork_rng(devices=[]):  # modules only draw from the global generator
        torch.manual_seed(seed)
        return FashionCNN(widths)


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


def load_model(path: str | Path = CHECKPOINT) -> FashionCNN:
    """The trained network from its checkpoint (default: the shipped one), in eval mode.

    Raises FileNotFoundError with the command that makes it, ValueError if the file holds another network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {path}; restore data/cnn from the repository, "
            f"or train the network: {TRAIN_COMMAND}"
        )
    state = load_file(path)
    try:
        first, second, third = (state[f"block{i}.conv1.weight"].shape[0] for i in (1, 2, 3))
        model = FashionCNN((first, second, third))
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds another network ({error}); train this one: {TRAIN_COMMAND}") from None
    return model.eval()


def save_model(model: FashionCNN, path: str | Path = CHECKPOINT) -> None:
    """Write the network's parameters and normalisation statistics as safetensors."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m eigendecomp.targets.fashion.network")
    parser.add_argument("command", choices=("train",))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=Settings().epochs)
    parser.add_argument("--root", help="holds FashionMNIST/raw (default: EIGENDECOMP_DATA or data/downloads)")
    parser.add_argument("--threads", type=int, default=1, help="more are slower on a machine with other work")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="training.json goes beside it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command line: ``train`` writes the checkpoint and its record beside it."""
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
    chosen.output.with_name(RECORD.name).write_text(json.dumps(record, indent=2) + "\n")
    print(f"test accuracy {record['test_accuracy']:.4f}, {seconds:.0f} s, {chosen.output}")


if __name__ == "__main__":
    main()
