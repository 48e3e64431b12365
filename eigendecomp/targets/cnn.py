"""Two convolutional targets: a residual network for Fashion-MNIST, and torchvision's MobileNet-v3-small.

The first has three stages of one residual block each; the pattern ``block2.*`` selects its middle block (two
convolutions, two normalisations, an identity skip; 14 × 14 positions). It reads images in [0, 1], as
``fashion.load`` returns them; its first normalisation standardises them.

    python -m eigendecomp.targets.cnn train      # about ten minutes on one core; data/cnn ships the result
"""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.interventions import Move
from eigendecomp.targets import fashion

CHECKPOINT = fashion.DATA / "cnn" / "fashion_cnn.safetensors"
RECORD = fashion.DATA / "cnn" / "training.json"
TRAIN_COMMAND = "python -m eigendecomp.targets.cnn train"
MIDDLE_BLOCK = "block2"
MOBILENET_BLOCK = "features.7"


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


class FromMiddle(nn.Module):
    """A network from its middle block on, sharing its modules: what enters the block (n, c, 14, 14) to logits.

    All that changes in the middle block or after it is seen here at half the cost.
    """

    def __init__(self, model: FashionCNN) -> None:
        super().__init__()
        self.block2, self.down2, self.block3, self.head = model.block2, model.down2, model.block3, model.head
        self.train(model.training)

    def forward(self, entering: Float[Tensor, "n c 14 14"]) -> Float[Tensor, "n 10"]:
        return self.after_block(self.block2(entering))

    def after_block(self, output: Float[Tensor, "n c 14 14"]) -> Float[Tensor, "n 10"]:
        """The logits from what the middle block writes."""
        return self.head(self.block3(self.down2(output)).mean(dim=(2, 3)))


def contribution_maps(
    tail: FromMiddle,
    change: Mapping[str, Tensor],
    entering: Float[Tensor, "n c 14 14"],
    cotangents: Float[Tensor, "n k"],
) -> Float[Tensor, "n 14 14"]:
    """How much each position of the middle block adds to ⟨Jᵀc, u⟩: maps that sum up to it.

    ``change`` is the direction u by parameter, as ``interventions.low_rank`` gives it. A layer adds, at every position,
    the change of its output along u, its input staying as it is, times what the output is asked to change.
    """
    block, u = tail.block2, {name.removeprefix("block2."): value for name, value in change.items()}
    with torch.enable_grad():
        x = entering.detach().requires_grad_()  # so that there is a graph whatever the parameters ask for
        first = block.conv1(x)
        first_normed = block.bn1(first)
        hidden = block.relu1(first_normed)
        second = block.conv2(hidden)
        second_normed = block.bn2(second)
        later = tail.after_block(block.relu2(x + second_normed))
        asked = torch.autograd.grad(later, [first, first_normed, second, second_normed], cotangents)

    with torch.no_grad():
        inputs = (x, first, hidden, second)
        changes = [run(given) for run, given in zip(changes_along(block, u).values(), inputs, strict=True)]
        return torch.stack([(g * moved).sum(1) for g, moved in zip(asked, changes, strict=True)]).sum(0)


def changes_along(block: ResidualBlock, u: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each layer of the block, from its input to how its output changes along u: exact, since layers are linear."""

    def normed(name: str) -> Callable[[Tensor], Tensor]:
        norm, scale, shift = block.get_submodule(name), u[f"{name}.weight"], u[f"{name}.bias"]
        assert isinstance(norm, nn.BatchNorm2d)
        return lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, scale, shift, eps=norm.eps)

    def convolved(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: F.conv2d(x, u[f"{name}.weight"], padding=1)

    return {"conv1": convolved("conv1"), "bn1": normed("bn1"), "conv2": convolved("conv2"), "bn2": normed("bn2")}


class Gated(nn.Module):
    """A network whose middle block's parameters are moved for every image by its own amount, ``step`` times its gate.

    Called with what enters the block and a gate (n,) for each image. It is to a direction what scaling a unit of an
    autoencoder is to the unit: an image whose gate is zero is left alone.
    """

    def __init__(self, tail: FromMiddle) -> None:
        super().__init__()
        self.tail, self.step = tail, 0.0
        self.changes: dict[str, Callable[[Tensor], Tensor]] = {}

    def forward(self, entering: Float[Tensor, "n c 14 14"], gate: Float[Tensor, " n"]) -> Float[Tensor, "n 10"]:
        steps = (self.step * gate)[:, None, None, None]
        handles = [
            self.tail.block2.get_submodule(name).register_forward_hook(
                lambda _module, given, output, run=run: output + steps * run(given[0])
            )
            for name, run in self.changes.items()
        ]
        try:
            return self.tail(entering)
        finally:
            for handle in handles:
                handle.remove()

    def along(self, change: Mapping[str, Tensor]) -> Move:
        """δ ↦ this network, moved along a direction given by parameter."""

        @contextmanager
        def move(delta: float) -> Iterator[nn.Module]:
            named = {name.removeprefix("block2."): value for name, value in change.items()}
            self.changes, self.step = changes_along(self.tail.block2, named), delta
            try:
                yield self
            finally:
                self.changes = {}

        return move


def shifted(tail: FromMiddle, row: Float[Tensor, " c"]) -> Move:
    """δ ↦ the network with δ · row added to the middle block's output at every position."""

    @contextmanager
    def move(delta: float) -> Iterator[nn.Module]:
        handle = tail.block2.register_forward_hook(lambda *called: called[-1] + delta * row[:, None, None])
        try:
            yield tail
        finally:
            handle.remove()

    return move


def attribution(
    tail: FromMiddle,
    entering: Float[Tensor, "n c 14 14"],
    z: Float[Tensor, "n positions units"],
    decoder: Float[Tensor, "units c"],
) -> Float[Tensor, "n k units"]:
    """What each unit of a code of the middle block's output adds to each logit, to first order, over all positions.

    This is what J u is to a direction: by it, units are read with the same knowledge of the outputs.
    """
    found = []
    for part, codes in zip(entering.split(250), z.split(250), strict=True):
        with torch.enable_grad():
            output = tail.block2(part).detach().requires_grad_()
            logits = tail.after_block(output)
            rows = [torch.autograd.grad(f.sum(), output, retain_graph=True)[0] for f in logits.unbind(1)]
        asked = torch.stack(rows, 1).flatten(3)  # (n, k, c, positions)
        found.append(torch.einsum("npu,nkcp,uc->nku", codes, asked, decoder))
    return torch.cat(found)


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
    with torch.random.fork_rng(devices=[]):  # modules only draw from the global generator
        torch.manual_seed(seed)
        model = FashionCNN(settings.widths)
    model = model.to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=True,
    )
    batches = max(1, len(kept) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * batches, pct_start=0.25
    )
    history = []
    for epoch in range(settings.epochs):
        model.train()
        total = 0.0
        order = kept[torch.randperm(len(kept), generator=generator)]
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


def mobilenet(pretrained: bool = True, seed: int = 0) -> nn.Module:
    """torchvision's MobileNet-v3-small in eval mode, no activation in place; its logits are ImageNet's 1000.

    ``pretrained`` takes the ImageNet weights by name, from torch's cache or the network. Without it, weights
    are random, drawn from the seed, with the normalisation statistics of noise, for tests only. The published
    setting decomposes the parameters ``MOBILENET_BLOCK + ".*"``. Raises OSError with the remedies where the
    weights cannot be had, ImportError where torchvision is not installed.
    """
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

    weights = MobileNet_V3_Small_Weights.IMAGENET1K_V1 if pretrained else None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = mobilenet_v3_small(weights=weights)
            if not pretrained:  # with untouched statistics the signal fades to 1e-10 on its way through
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.momentum = 1.0
                with torch.no_grad():
                    model.train()(torch.randn(32, 3, 64, 64))
    except OSError as error:
        assert weights is not None
        raise OSError(
            f"the weights of mobilenet_v3_small could not be fetched ({error}). Remedies: put "
            f"{Path(weights.url).name} into the folder checkpoints of torch.hub.get_dir() "
            "(TORCH_HOME/hub); or, for a test, use random weights: mobilenet(pretrained=False)"
        ) from None
    for module in model.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 (pyright takes a module's attributes for tensors)
    return model.eval()


def mobilenet_images(images: Float[Tensor, "n c h w"], size: int = 224) -> Float[Tensor, "n 3 size size"]:
    """Grey or colour images in [0, 1], resized to ``size`` and normalised as the ImageNet weights expect.

    Raises ValueError for another number of channels or values outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (n, 1 or 3, height, width)")
    if not (images.is_floating_point() and images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images must be floats in [0, 1]; got {images.dtype} up to {images.max():g}")
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    resized = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (resized - mean) / deviation


def main(arguments: list[str] | None = None) -> None:
    """The command line: ``train`` writes the checkpoint and its record beside it."""
    parser = argparse.ArgumentParser(prog="python -m eigendecomp.targets.cnn")
    parser.add_argument("command", choices=("train",))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=Settings().epochs)
    parser.add_argument("--root", help="holds FashionMNIST/raw (default: EIGENDECOMP_DATA or data/downloads)")
    parser.add_argument("--threads", type=int, default=1, help="more are slower on a machine with other work")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="training.json goes beside it")
    chosen = parser.parse_args(arguments)
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
