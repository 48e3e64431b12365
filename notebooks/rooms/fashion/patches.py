"""Patches of the middle block's first convolution: the network with that layer as a matrix, parts of garments as
concepts of patches, what each patch adds to a decision, and floors that are made of patches and of single gradients.
"""

import copy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from eigendecomp.study import clusters
from eigendecomp.study.clusters import rebuilt as rebuilt
from eigendecomp.support.random import generator
from eigendecomp.targets.fashion.images import (
    ANKLE_BOOT,
    BAG,
    COAT,
    DRESS,
    PULLOVER,
    SANDAL,
    SHIRT,
    SNEAKER,
    T_SHIRT,
    TROUSER,
)
from rooms.fashion.block import FromMiddle

LIT, SIDE, CELLS = 0.05, 28, 14  # of a pixel that belongs to the garment; pixels and patches along a side
FOOTWEAR, TOPS = (SANDAL, SNEAKER, ANKLE_BOOT), (T_SHIRT, PULLOVER, COAT, SHIRT)


class PatchMatrix(nn.Module):
    """A 3 × 3 convolution without bias as what it is: one matrix that multiplies every patch of its input."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight.detach().flatten(1)
        self.matrix = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.matrix.weight.data.copy_(weight)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        return self.matrix(patches(x)).mT.unflatten(2, x.shape[2:])


def patches(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n hw p"]:
    """What a 3 × 3 convolution meets at every position."""
    return F.unfold(x, 3, padding=1).mT


def unfolded(tail: FromMiddle) -> FromMiddle:
    """A copy of the network from its middle block on whose first convolution is a :class:`PatchMatrix`.

    A direction of rank one in its parameter ``block2.conv1.matrix.weight`` has one reader, a patch, and one writer.
    """
    other = copy.deepcopy(tail)
    other.block2.conv1 = PatchMatrix(other.block2.conv1)  # pyright: ignore[reportAttributeAccessIssue]
    return other.eval()


# ----------------------------------------------------------------------------------------------------- concepts


def parts(images: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"]) -> dict[str, Bool[Tensor, "n 196"]]:
    """Which patches show which part of which garment, from labels and pixels: each cell has two by two of them.

    A garment's box goes from its first to its last lit pixel; *up* and *left* are measured in it from 0 to 1. Shoes
    point to the left in these images. Raises ValueError if there are not as many labels as images.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; give one label for each image")
    light = F.avg_pool2d(images, 2)[:, 0]
    lit, down, across = light > LIT, *_place(images[:, 0] > LIT)
    hole = ~lit & (lit.cumsum(2) > 0) & (lit.flip(2).cumsum(2).flip(2) > 0)
    side, middle = (across < 0.2) | (across > 0.8), (across - 0.5).abs() < 0.17

    def of(*members: int) -> Tensor:
        return torch.isin(labels, torch.tensor(members))[:, None, None]

    cells = {
        "sole": of(*FOOTWEAR) & lit & (down > 0.85),
        "toe": of(*FOOTWEAR) & lit & (across < 0.15),
        "heel": of(SNEAKER, ANKLE_BOOT) & lit & (across > 0.88) & (down > 0.5),
        "boot shaft": of(ANKLE_BOOT) & lit & (down < 0.3),
        "sneaker collar": of(SNEAKER) & lit & (down < 0.25),
        "between straps": of(SANDAL) & hole,
        "cuff": of(PULLOVER, COAT, SHIRT) & lit & side & (down > 0.7),
        "shoulder": of(*TOPS) & lit & (down < 0.15) & ~middle,
        "neckline": of(*TOPS, DRESS) & middle & (down < 0.12),
        "hem of a top": of(*TOPS) & lit & middle & (down > 0.92),
        "gap at the sleeve": of(PULLOVER, COAT, SHIRT) & hole & (down > 0.3),
        "gap between legs": of(TROUSER) & hole & (down > 0.25),
        "waist of trousers": of(TROUSER) & lit & (down < 0.12),
        "hem of trousers": of(TROUSER) & lit & (down > 0.93),
        "hem of a dress": of(DRESS) & lit & (down > 0.93),
        "bag's handle": of(BAG) & lit & (down < 0.25),
        "inside a bag's handle": of(BAG) & hole & (down < 0.4),
        "bag's corner": of(BAG) & lit & side & (down > 0.85),
    }
    return {name: held.flatten(1) for name, held in (cells | patterns(images, lit)).items()}


def _place(lit: Bool[Tensor, "n h w"]) -> tuple[Float[Tensor, "n 14 14"], Float[Tensor, "n 14 14"]]:
    """How far down and across the garment's box the centre of every patch lies."""
    places = []
    centre = 2 * torch.arange(CELLS) + 1.0
    for axis in (2, 1):
        line = lit.any(axis).float()
        first, last = line.argmax(1), SIDE - line.flip(1).argmax(1)
        places.append((centre - first[:, None]) / (last - first)[:, None])
    down, across = places
    return down[:, :, None].expand(-1, -1, CELLS), across[:, None, :].expand(-1, CELLS, -1)


def patterns(images: Float[Tensor, "n 1 28 28"], lit: Bool[Tensor, "n 14 14"]) -> dict[str, Bool[Tensor, "n 14 14"]]:
    """Outlines by the side on which the background lies, and patterns inside of a garment, where all around is lit."""
    wide = F.pad(lit.float(), (1,) * 4)
    above, below, left, right = wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:]
    inside = -F.max_pool2d(-wide[:, None], 3, stride=1)[:, 0] > 0
    x = images[:, 0]
    down, across = (
        F.pad((x[:, 1:] - x[:, :-1]).abs(), (0, 0, 0, 1)),
        F.pad((x[:, :, 1:] - x[:, :, :-1]).abs(), (0, 1)),
    )
    vertical, horizontal = (F.avg_pool2d(d[:, None], 4, stride=2, padding=1)[:, 0] for d in (down, across))
    return {
        "top outline": lit & (above == 0) & (left + right == 2),
        "bottom outline": lit & (below == 0) & (left + right == 2),
        "left outline": lit & (left == 0) & (above + below == 2),
        "right outline": lit & (right == 0) & (above + below == 2),
        "corner": lit & (above + below + left + right == 2) & (above + below == 1),
        "stripes across": inside & (vertical > 0.12) & (vertical > 2 * horizontal),
        "stripes down": inside & (horizontal > 0.12) & (horizontal > 2 * vertical),
        "busy": inside & (vertical > 0.12) & (horizontal > 0.12),
        "plain": inside & (vertical + horizontal < 0.02),
    }


def decision(
    model: FromMiddle, entering: Float[Tensor, "n c 14 14"], a: int, b: int
) -> tuple[Float[Tensor, "n 196"], Float[Tensor, "d p"]]:
    """What every patch adds to f_a − f_b, to first order, and the gradient of their mean difference in the matrix.

    A patch adds what the first convolution makes of it, less the mean over the image, times what is asked there.
    """
    with torch.enable_grad():
        first = model.block2.conv1(entering.detach()).detach().requires_grad_()
        later = model.block2.conv2(model.block2.relu1(model.block2.bn1(first)))
        f = model.after(model.block2.relu2(entering + model.block2.bn2(later)))
        (asked,) = torch.autograd.grad((f[:, a] - f[:, b]).sum(), first)
    asked, written = asked.flatten(2), first.detach().flatten(2)
    added = (asked * (written - written.mean(2, keepdim=True))).sum(1)
    return added, torch.einsum("ndt,ntp->dp", asked, patches(entering)) / len(entering)


# ------------------------------------------------------------------------------------------------------- floors


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows at norm one; a row of zeros stays."""
    return F.normalize(x, dim=1)


def input_means(
    x: Float[Tensor, "n d"], count: int, *, seed: int, steps: int = 12
) -> tuple[Float[Tensor, "v d"], Int[Tensor, " n"]]:
    """Spherical k-means of inputs from random ones: unit centres, and each input's centre. Empty centres stay."""
    x = unit_rows(x)
    start = torch.randperm(len(x), generator=generator(seed, "centres"))[:count]
    return clusters.settled(x, x[start], steps, refill=False)[:2]


def gradient_means(
    x: Float[Tensor, "n i"], asked: Float[Tensor, "n o"], count: int, *, seed: int, steps: int = 12
) -> tuple[Float[Tensor, "v i"], Float[Tensor, "v o"]]:
    """k-lines of gradients x ⊗ asked with centres a ⊗ b of rank one, from random gradients: unit readers and writers.

    A gradient belongs to the centre with the largest |⟨x, a⟩⟨asked, b⟩|; centres take one power step at a time.
    """
    x, asked = unit_rows(x), unit_rows(asked)
    start = torch.randperm(len(x), generator=generator(seed, "centres"))[:count]
    return clusters.settled_products(x, asked, x[start], asked[start], False, steps)[1:]
