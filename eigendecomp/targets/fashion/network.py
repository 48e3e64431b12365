"""A residual network for Fashion-MNIST, and its shipped checkpoint.

It has three stages of one residual block each; the pattern ``block2.*`` selects its middle block (two convolutions, two
normalisations, an identity skip; 14 × 14 positions), on which ``cnn_block`` reads and acts. It reads images in [0, 1],
as ``fashion.load`` returns them; its first normalisation standardises them.

    python data/cnn/train_network.py      # trains it in about ten minutes on one core; data/cnn ships the result
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from eigendecomp.targets.fashion import images as fashion

CHECKPOINT = fashion.DATA / "cnn" / "fashion_cnn.safetensors"
TRAIN_COMMAND = "python data/cnn/train_network.py"


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


def split_indices(n: int, held_out: int, seed: int) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held_out"]]:
    """Indices to train on and indices held out, both in random order.

    Raises ValueError if ``held_out`` leaves nothing to train on.
    """
    if not 0 <= held_out < n:
        raise ValueError(f"held_out={held_out} must lie in 0 … {n - 1} for {n} images")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[held_out:], order[:held_out]


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
