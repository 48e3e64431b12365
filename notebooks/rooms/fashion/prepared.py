"""What the notebooks on the classifier start from: the network, three sets of images, and what they ask of directions.

Fits see training images; units, readings and settings are chosen on images that the network's training held out;
scores are of test images.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion import network as cnn
from rooms.fashion.block import FromMiddle


@dataclass(frozen=True)
class Prepared:
    """The network, and by part (``fit``, ``choose``, ``test``) images, labels, what enters the block, and logits."""

    network: cnn.FashionCNN
    tail: FromMiddle
    images: dict[str, Float[Tensor, "n 1 28 28"]]
    labels: dict[str, Int[Tensor, " n"]]
    entering: dict[str, Float[Tensor, "n c 14 14"]]
    logits: dict[str, Float[Tensor, "n 10"]]


@torch.no_grad()
def prepare(fit: int, choose: int, test: int, *, subset: bool = False) -> Prepared:
    """So many images of each part, taken through the network up to its middle block once.

    The data are fetched if they are not there; with ``subset`` the few in the repository are used instead. Raises
    ValueError if a part is to have more images than there are.
    """
    if not subset:
        fashion.ensure()
    x, y = fashion.load("train", subset=subset)
    learned, held_out = cnn.split_indices(len(x), len(x) // 12, seed=0)
    test_x, test_y = fashion.load("test", subset=subset)
    for split, wanted, there in (("fit", fit, learned), ("choose", choose, held_out), ("test", test, test_x)):
        if wanted > len(there):
            raise ValueError(f"{split}={wanted}, but there are only {len(there)} such images")
    taken = {"fit": learned[:fit], "choose": held_out[:choose]}
    images = {split: x[index] for split, index in taken.items()} | {"test": test_x[:test]}
    labels = {split: y[index] for split, index in taken.items()} | {"test": test_y[:test]}
    network = cnn.load_model()
    tail = FromMiddle(network)
    entering = {split: torch.cat([network.enter(some) for some in whole.split(250)]) for split, whole in images.items()}
    logits = {split: cnn.predict(tail, some) for split, some in entering.items()}
    return Prepared(network, tail, images, labels, entering, logits)


def confusions(
    logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"], least: int
) -> dict[tuple[int, int], Int[Tensor, " m"]]:
    """{(a, b): the images of class a whose most probable other class is b}, where there are at least so many."""
    other = logits.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(1)
    k = logits.shape[1]
    pairs = {(a, b): ((labels == a) & (other == b)).nonzero()[:, 0] for a in range(k) for b in range(k) if a != b}
    return {pair: index for pair, index in pairs.items() if len(index) >= least}


def raising(moves: Float[Tensor, "v k"], wanted: Float[Tensor, "v k"]) -> Float[Tensor, " v"]:
    """The sign, 1 or −1, with which each direction raises what it is named for.

    ``moves`` is how the logits move for a positive step, ``wanted`` a weight for each logit, such as one for the
    classes it is named for; a shift of all logits alike counts for nothing, and of no move at all the sign is 1.
    """
    centred = moves - moves.mean(1, keepdim=True)
    return torch.where((centred * wanted).sum(1) < 0, -1.0, 1.0)
