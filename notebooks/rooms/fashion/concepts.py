"""Concepts of Fashion-MNIST's images: its classes, and more that are computed from label or image.

Their thresholds were chosen on the training images; ``python -m rooms.fashion.concepts`` computes them
again.
"""

import argparse
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from eigendecomp.targets.fashion import images as fashion
from eigendecomp.targets.fashion.images import ANKLE_BOOT, CLASSES, COAT, PULLOVER, SANDAL, SHIRT, SNEAKER, T_SHIRT

LIT = 0.05  # a brighter pixel belongs to the garment: few of its own are darker, the background is 0
SIDE = 28


class Rule(NamedTuple):
    """A concept: the images of ``classes`` (all if empty) whose ``measure`` is at or beyond ``threshold``.

    ``share`` is the share of those classes' training images that the threshold was chosen to pick.
    """

    measure: str
    side: Literal["high", "low"]
    share: float
    threshold: float
    classes: tuple[int, ...] = ()


LABEL_RULES = {
    "footwear": (SANDAL, SNEAKER, ANKLE_BOOT),
    "upper_body": (T_SHIRT, PULLOVER, COAT, SHIRT),
}
RULES = {
    "long_sleeves": Rule("sleeve_width", "high", 0.625, 17.86, LABEL_RULES["upper_body"]),
    "front_line": Rule("front_line", "high", 0.25, 0.03645, LABEL_RULES["upper_body"]),
    "arched_sole": Rule("arch", "high", 0.25, 6.0, LABEL_RULES["footwear"]),
    "bright": Rule("brightness", "high", 0.25, 0.7419),
    "dark": Rule("brightness", "low", 0.25, 0.4931),
    "high_contrast": Rule("contrast", "high", 0.25, 0.226),
    "textured": Rule("texture", "high", 0.2, 0.1038),
    "plain": Rule("texture", "low", 0.2, 0.04038),
    "crosswise": Rule("grain", "high", 0.2, 0.194),
    "lengthwise": Rule("grain", "low", 0.2, -0.3781),
    "narrow": Rule("width", "low", 0.2, 17.0),
    "wide": Rule("width", "high", 0.35, 27.0),
    "large_area": Rule("area", "high", 0.25, 0.5842),
    "strappy": Rule("holes", "high", 0.15, 0.1365),
    "filled": Rule("holes", "low", 0.25, 0.01509),
    "open_above": Rule("holes_above", "high", 0.2, 0.1452),
    "split_below": Rule("holes_below", "high", 0.2, 0.1875),
    "symmetric": Rule("asymmetry", "low", 0.25, 0.09787),
    "top_heavy": Rule("centre", "low", 0.2, 0.4807),
    "bottom_heavy": Rule("centre", "high", 0.2, 0.5861),
    "light_top": Rule("shade", "high", 0.15, 0.0645),
    "light_bottom": Rule("shade", "low", 0.15, -0.06975),
}


def _mean(values: Float[Tensor, "n h w"], mask: Tensor) -> Float[Tensor, " n"]:
    return (values * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def _box(lit: Bool[Tensor, "n side"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The first and the last place along an axis that is lit."""
    return lit.float().argmax(1), SIDE - 1 - lit.float().flip(1).argmax(1)


def _differences(x: Float[Tensor, "n h w"], lit: Bool[Tensor, "n h w"]) -> tuple[Tensor, Tensor]:
    """The mean absolute differences of neighbours inside the garment, down it and across it, each (n,)."""
    inside = -F.max_pool2d(-F.pad(lit[:, None].float(), (1,) * 4), 3, stride=1)[:, 0] > 0
    down = _mean((x[:, 1:] - x[:, :-1]).abs(), inside[:, 1:] & inside[:, :-1])
    across = _mean((x[:, :, 1:] - x[:, :, :-1]).abs(), inside[:, :, 1:] & inside[:, :, :-1])
    return down, across


def _measures(images: Float[Tensor, "n 1 28 28"]) -> dict[str, Float[Tensor, " n"]]:
    x = images[:, 0]
    lit = x > LIT
    index = torch.arange(SIDE)
    (top, bottom), (left, right) = _box(lit.any(2)), _box(lit.any(1))
    height = bottom - top + 1
    # per row: how far down the garment, from 0 (its top) to 1; rows beyond it are in none of the bands
    level = ((index - top[:, None]) + 0.5) / height[:, None]

    def band(start: float, end: float) -> Tensor:
        return ((level > start) & (level < end) & (level > 0) & (level < 1))[:, :, None].expand_as(lit)

    seen = lit.byte()
    begun = seen.cumsum(2, dtype=torch.uint8)
    silhouette = (begun > 0) & (begun - seen < begun[:, :, -1:])
    holes = (silhouette & ~lit).float()
    soles = ((index >= bottom[:, None] - 1) & (index <= bottom[:, None]))[:, :, None]
    total = x.sum((1, 2)).clamp(min=1e-6)
    brightness = _mean(x, lit)
    down, across = _differences(x, lit)
    middle, beside = x[:, :, 13:15].mean(2), (x[:, :, 10:12].mean(2) + x[:, :, 16:18].mean(2)) / 2
    return {
        "width": (right - left + 1).float() * lit.any(2).any(1),
        "area": lit.float().mean((1, 2)),
        "brightness": brightness,
        "contrast": _mean((x - brightness[:, None, None]) ** 2, lit).sqrt(),
        "texture": (down + across) / 2,
        "grain": (down - across) / (down + across).clamp(min=1e-6),
        "holes": _mean(holes, silhouette),
        "holes_above": _mean(holes, silhouette & band(0, 1 / 3)),
        "holes_below": _mean(holes, silhouette & band(2 / 3, 1)),
        "arch": (holes * soles).sum((1, 2)) / 2,
        "asymmetry": (x - x.flip(2)).abs().sum((1, 2)) / (2 * total),
        "centre": (x * level[:, :, None]).sum((1, 2)) / total,
        "shade": _mean(x, lit & band(0, 0.5)) - _mean(x, lit & band(0.5, 1)),
        "sleeve_width": _mean(silhouette.float(), band(0.6, 0.85)) * SIDE,
        "front_line": _mean((middle - beside)[:, :, None].expand_as(x), band(0.3, 0.9)).abs(),
    }


def measures(images: Float[Tensor, "n 1 28 28"]) -> dict[str, Float[Tensor, " n"]]:
    """What the rules of the concepts compare with their thresholds, each one number an image.

    A pixel is lit if brighter than ``LIT``. The silhouette fills each row from its first to its last lit one;
    its unlit pixels are holes. Heights and thirds are those of the garment's own box.

    ============  ==========================================================================================
    width         pixels, of the box
    area          lit share of the image
    brightness    mean of the lit pixels
    contrast      standard deviation of the lit pixels
    texture       mean absolute difference of neighbours inside the garment (its outline left out)
    grain         of these differences: −1 if all lie along rows (lines down the garment), 1 if across them
    holes         holes' share of the silhouette
    holes_above   the same in the upper third
    holes_below   the same in the lower third
    arch          holes a row in the two lowest rows, in pixels: the room under a shoe before its heel
    asymmetry     light that differs from the mirror image, from 0 (symmetric about the middle) to 1
    centre        centre of mass of the light, from 0 (top of the box) to 1 (bottom)
    shade         mean of the upper half's lit pixels minus the lower half's
    sleeve_width  mean width of the silhouette where long sleeves hang (60 to 85% down), in pixels
    front_line    how much the two middle columns differ from their sides, 30 to 90% down: zip or buttons
    ============  ==========================================================================================

    Raises ValueError for images of another shape or outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1:] != (1, SIDE, SIDE):
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (n, 1, {SIDE}, {SIDE})")
    if not len(images):
        raise ValueError("images is empty; give at least one image")
    if not (images.is_floating_point() and images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"images must be floats in [0, 1], as load() returns them; got {images.dtype} "
            f"in [{images.min():g}, {images.max():g}]"
        )
    parts = [_measures(batch.float()) for batch in images.split(500)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or not ((labels >= 0) & (labels < len(CLASSES))).all():
        raise ValueError(f"labels must be integers in 0 … {len(CLASSES) - 1}, shape (n,); got {labels!r}")


def classes(labels: Int[Tensor, " n"]) -> dict[str, Bool[Tensor, " n"]]:
    """The ten classes as concepts, by name. Raises ValueError for labels out of range."""
    _check_labels(labels)
    return {name: labels == index for index, name in enumerate(CLASSES)}


def concepts(images: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"]) -> dict[str, Bool[Tensor, " n"]]:
    """The concepts beyond the ten classes, by name: ``LABEL_RULES`` from the label, ``RULES`` from the image.

    Each holds for 5% to 60% of the test images. Raises ValueError for bad images, labels, or unequal lengths.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; give one label for each image")
    _check_labels(labels)
    measured = measures(images)
    truth = {name: torch.isin(labels, torch.tensor(members)) for name, members in LABEL_RULES.items()}
    for name, rule in RULES.items():
        value = measured[rule.measure]
        holds = value >= rule.threshold if rule.side == "high" else value <= rule.threshold
        truth[name] = holds & torch.isin(labels, torch.tensor(rule.classes)) if rule.classes else holds
    return truth


def thresholds(images: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Every rule's threshold, computed from its ``share`` on these images, to four significant digits."""
    measured = measures(images)
    limits = {}
    for name, rule in RULES.items():
        value = measured[rule.measure]
        if rule.classes:
            value = value[torch.isin(labels, torch.tensor(rule.classes))]
        quantile = value.quantile(1 - rule.share if rule.side == "high" else rule.share).item()
        limits[name] = float(f"{quantile:.4g}")
    return limits


def main(arguments: list[str] | None = None) -> None:
    """The command line: print every threshold, computed and in use, and the share of either split that holds."""
    parser = argparse.ArgumentParser(prog="python -m rooms.fashion.concepts")
    parser.add_argument("--root", help="holds FashionMNIST/raw (default: EIGENDECOMP_DATA or data/downloads)")
    root = parser.parse_args(arguments).root
    try:
        train, test = fashion.load("train", root), fashion.load("test", root)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    held = {split: concepts(*data) for split, data in (("train", train), ("test", test))}
    computed = thresholds(*train)
    print(f"{'concept':16}{'threshold':>10}{'in use':>10}{'train':>8}{'test':>8}")
    for name in held["test"]:
        values = f"{computed[name]:10.4g}{RULES[name].threshold:10.4g}" if name in RULES else " " * 20
        shares = (held[split][name].float().mean().item() for split in ("train", "test"))
        print(f"{name:16}{values}" + "".join(f"{share:8.1%}" for share in shares))


if __name__ == "__main__":
    main()
