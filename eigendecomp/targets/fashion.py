"""Fashion-MNIST: fetching, checking and reading the data, and concepts computed from image or label.

Images are float32 in [0, 1] with shape (n, 1, 28, 28), bright garments on an exactly black background; labels
are int64 with shape (n,). The four unpacked IDX files lie in ``ROOT/FashionMNIST/raw``, as torchvision keeps
them, and their sha256 is checked whenever they are read. ``ROOT`` is the argument ``root``, or else the
environment variable EIGENDECOMP_DATA, or else ``data/downloads`` in the repository.

    python -m eigendecomp.targets.fashion fetch         # torchvision's download, else Debian's package
    python -m eigendecomp.targets.fashion subset        # writes data/cnn/fashion_subset.safetensors
    python -m eigendecomp.targets.fashion thresholds    # recomputes the thresholds of the concepts
"""

import argparse
import gzip
import hashlib
import math
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

Split = Literal["train", "test"]

DATA = Path(__file__).resolve().parents[2] / "data"
DOWNLOADS = DATA / "downloads"
SUBSET = DATA / "cnn" / "fashion_subset.safetensors"
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
T_SHIRT, TROUSER, PULLOVER, DRESS, COAT, SANDAL, SHIRT, SNEAKER, BAG, ANKLE_BOOT = range(10)

PREFIX = {"train": "train", "test": "t10k"}
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
REMEDIES = f"""  1. python -m eigendecomp.targets.fashion fetch
     (torchvision's download where the network allows; else `apt-get download {DEBIAN_PACKAGE}`, without root)
  2. put the four unpacked IDX files into ROOT/FashionMNIST/raw and set EIGENDECOMP_DATA=ROOT"""


# ---------------------------------------------------------------------------------------------------- reading


def parse_idx(raw: bytes, name: str = "IDX data") -> UInt8[Tensor, "..."]:
    """The array in the bytes of an unpacked IDX file of unsigned bytes, in its own shape.

    Raises ValueError, naming the file, for packed data, another element type, or a length that is not the
    header's.
    """
    if raw[:2] == b"\x1f\x8b":
        raise ValueError(f"{name} is still gzip-packed; unpack it first, with gunzip")
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{name} is no IDX file of bytes: it starts with {raw[:4].hex()!r}, not '000008'")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    count = math.prod(shape)
    if len(raw) != start + count:
        raise ValueError(f"{name} has {len(raw)} bytes; its header (shape {shape}) asks for {start + count}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).reshape(shape)


def verified(path: Path, sha256: str | None = None) -> bytes:
    """The file's bytes, once their sha256 is the expected one (default: by file name, from ``SHA256``).

    Raises ValueError that names the file and both sums.
    """
    raw = path.read_bytes()
    expected, found = sha256 or SHA256[path.name], hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is damaged or another file: its sha256 is {found}, expected {expected}; "
            "delete it and run: python -m eigendecomp.targets.fashion fetch"
        )
    return raw


def raw_folder(root: str | Path | None = None) -> Path:
    """The folder that holds the four IDX files.

    Only ``root`` is searched if it is given; else EIGENDECOMP_DATA and then ``data/downloads``. Raises
    FileNotFoundError, at once, that names the places searched and the remedies.
    """
    environment = os.environ.get("EIGENDECOMP_DATA")
    roots = [Path(root)] if root is not None else [*([Path(environment)] if environment else []), DOWNLOADS]
    folders = [r / "FashionMNIST" / "raw" for r in roots]
    for folder in folders:
        if all((folder / name).is_file() for name in SHA256):
            return folder
    searched = " or ".join(str(f) for f in folders)
    raise FileNotFoundError(f"Fashion-MNIST (four IDX files) is not in {searched}. Remedies:\n{REMEDIES}")


def available(root: str | Path | None = None) -> bool:
    """Whether the whole data set is there (its sums are checked by ``load``)."""
    try:
        raw_folder(root)
    except FileNotFoundError:
        return False
    return True


def ensure(root: str | Path | None = None) -> Path:
    """The folder that holds the four IDX files, which are fetched if they are not there yet.

    Raises OSError with every route's failure and the remedies if they cannot be fetched.
    """
    return raw_folder(root) if available(root) else fetch(root)


def load(
    split: Split, root: str | Path | None = None, *, subset: bool = False
) -> tuple[Float[Tensor, "n 1 28 28"], Int[Tensor, " n"]]:
    """Images in [0, 1] and labels of a split: 60,000 to train, 10,000 to test.

    ``subset=True`` reads the 2,500 images of either split that the repository ships, and nothing else.
    Raises ValueError for an unknown split or a damaged file, FileNotFoundError where the data is missing.
    """
    if split not in PREFIX:
        raise ValueError(f"split={split!r} is unknown; it is 'train' or 'test'")
    if subset:
        if root is not None:
            raise ValueError("subset=True reads the shipped subset; give either root or subset, not both")
        if not SUBSET.is_file():
            raise FileNotFoundError(
                f"the shipped subset {SUBSET} is missing; restore it from the repository, or, with the "
                "whole data, run: python -m eigendecomp.targets.fashion subset"
            )
        tensors = load_file(SUBSET)
        images, labels = tensors[f"{split}_images"], tensors[f"{split}_labels"]
    else:
        folder = raw_folder(root)
        names = (f"{PREFIX[split]}-images-idx3-ubyte", f"{PREFIX[split]}-labels-idx1-ubyte")
        images, labels = (parse_idx(verified(folder / name), name) for name in names)
    return images.unsqueeze(1).float() / 255, labels.long()


# --------------------------------------------------------------------------------------------------- fetching


def _from_torchvision(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none: a closed network would hang
    try:
        FashionMNIST(folder / "torchvision", download=True)
    finally:
        socket.setdefaulttimeout(before)
    for name in SHA256:
        shutil.move(folder / "torchvision" / "FashionMNIST" / "raw" / name, folder / name)


def _from_debian(folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise OSError(f"{tool} is not installed ({DEBIAN_PACKAGE} is a package of Debian's)")

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise OSError(f"`{' '.join(command)}` failed (try `apt-get update` first): {done.stderr.strip()}")

    quick = ("Acquire::Retries=0", "Acquire::http::Timeout=20", "Acquire::https::Timeout=20")  # a closed network
    run("apt-get", *(word for option in quick for word in ("-o", option)), "download", DEBIAN_PACKAGE)
    run("dpkg-deb", "-x", next(folder.glob("*.deb")).name, "unpacked")
    for name in SHA256:
        packed = next((folder / "unpacked").rglob(f"{name}.gz"))
        (folder / name).write_bytes(gzip.decompress(packed.read_bytes()))


ROUTES: dict[str, Callable[[Path], None]] = {"torchvision": _from_torchvision, "debian": _from_debian}


def fetch(root: str | Path | None = None) -> Path:
    """Put the four verified IDX files into ``root``, or else where the module says; returns their folder.

    Does nothing if they are there and whole. Raises OSError with every route's failure if none works.
    """
    folder = Path(root or os.environ.get("EIGENDECOMP_DATA") or DOWNLOADS) / "FashionMNIST" / "raw"
    try:
        for name in SHA256:
            verified(folder / name)
        return folder
    except (FileNotFoundError, ValueError):
        pass
    failures = []
    for route, download in ROUTES.items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                download(Path(scratch))
                for name in SHA256:
                    verified(Path(scratch) / name)
            except Exception as error:  # the next route may work; all are reported
                failures.append(f"  {route}: {type(error).__name__}: {error}")
                continue
            folder.mkdir(parents=True, exist_ok=True)
            for name in SHA256:
                shutil.move(Path(scratch) / name, folder / name)
            return folder
    raise OSError("Fashion-MNIST could not be fetched:\n" + "\n".join(failures) + f"\nRemedies:\n{REMEDIES}")


# --------------------------------------------------------------------------------------------------- concepts

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
# The thresholds are printed, from the training split, by: python -m eigendecomp.targets.fashion thresholds
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


def _measures(images: Float[Tensor, "n 1 28 28"]) -> dict[str, Float[Tensor, " n"]]:
    x = images[:, 0]
    lit = x > LIT
    index = torch.arange(SIDE)

    def box(axis: int) -> tuple[Tensor, Tensor]:
        along = lit.any(axis).float()
        return along.argmax(1), SIDE - 1 - along.flip(1).argmax(1)

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)

    (top, bottom), (left, right) = box(2), box(1)
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
    brightness = mean(x, lit)
    inside = -F.max_pool2d(-F.pad(seen[:, None].float(), (1,) * 4), 3, stride=1)[:, 0] > 0
    down = mean((x[:, 1:] - x[:, :-1]).abs(), inside[:, 1:] & inside[:, :-1])
    across = mean((x[:, :, 1:] - x[:, :, :-1]).abs(), inside[:, :, 1:] & inside[:, :, :-1])
    middle, beside = x[:, :, 13:15].mean(2), (x[:, :, 10:12].mean(2) + x[:, :, 16:18].mean(2)) / 2
    return {
        "width": (right - left + 1).float() * lit.any(2).any(1),
        "area": lit.float().mean((1, 2)),
        "brightness": brightness,
        "contrast": mean((x - brightness[:, None, None]) ** 2, lit).sqrt(),
        "texture": (down + across) / 2,
        "grain": (down - across) / (down + across).clamp(min=1e-6),
        "holes": mean(holes, silhouette),
        "holes_above": mean(holes, silhouette & band(0, 1 / 3)),
        "holes_below": mean(holes, silhouette & band(2 / 3, 1)),
        "arch": (holes * soles).sum((1, 2)) / 2,
        "asymmetry": (x - x.flip(2)).abs().sum((1, 2)) / (2 * total),
        "centre": (x * level[:, :, None]).sum((1, 2)) / total,
        "shade": mean(x, lit & band(0, 0.5)) - mean(x, lit & band(0.5, 1)),
        "sleeve_width": mean(silhouette.float(), band(0.6, 0.85)) * SIDE,
        "front_line": mean((middle - beside)[:, :, None].expand_as(x), band(0.3, 0.9)).abs(),
    }


def measures(images: Float[Tensor, "n 1 28 28"], batch_size: int = 500) -> dict[str, Float[Tensor, " n"]]:
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
    parts = [_measures(batch.float()) for batch in images.split(batch_size)]
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
    found = {name: torch.isin(labels, torch.tensor(members)) for name, members in LABEL_RULES.items()}
    for name, rule in RULES.items():
        value = measured[rule.measure]
        holds = value >= rule.threshold if rule.side == "high" else value <= rule.threshold
        found[name] = holds & torch.isin(labels, torch.tensor(rule.classes)) if rule.classes else holds
    return found


def thresholds(images: Float[Tensor, "n 1 28 28"], labels: Int[Tensor, " n"]) -> dict[str, float]:
    """Every rule's threshold, computed from its ``share`` on these images, to four significant digits."""
    measured = measures(images)
    found = {}
    for name, rule in RULES.items():
        value = measured[rule.measure]
        if rule.classes:
            value = value[torch.isin(labels, torch.tensor(rule.classes))]
        quantile = value.quantile(1 - rule.share if rule.side == "high" else rule.share).item()
        found[name] = float(f"{quantile:.4g}")
    return found


# ----------------------------------------------------------------------------------------------- command line


def write_subset(root: str | Path | None = None, size: int = 2500, seed: int = 0) -> Path:
    """Write the shipped subset: ``size`` images of either split, as many of every class; returns its path.

    Tensors ``train_images`` (size, 28, 28) and ``train_labels`` of bytes, ``train_index`` (their rows in the
    split), and the same for ``test``.
    """
    generator = torch.Generator().manual_seed(seed)
    folder, tensors = raw_folder(root), {}
    for split, prefix in PREFIX.items():
        images = parse_idx(verified(folder / f"{prefix}-images-idx3-ubyte"))
        labels = parse_idx(verified(folder / f"{prefix}-labels-idx1-ubyte"))
        order = torch.randperm(len(labels), generator=generator)
        chosen = [order[labels[order] == label][: size // len(CLASSES)] for label in range(len(CLASSES))]
        index = torch.cat(chosen).sort().values
        tensors |= {
            f"{split}_images": images[index],
            f"{split}_labels": labels[index],
            f"{split}_index": index.to(torch.int32),
        }
    SUBSET.parent.mkdir(parents=True, exist_ok=True)
    source = "Fashion-MNIST, (c) 2017 Zalando SE, https://github.com/zalandoresearch/fashion-mnist, MIT licence"
    save_file(tensors, SUBSET, metadata={"source": source})  # of several keys, the order would vary by run
    return SUBSET


def main(arguments: list[str] | None = None) -> None:
    """The command line: ``fetch``, ``subset`` or ``thresholds``."""
    parser = argparse.ArgumentParser(prog="python -m eigendecomp.targets.fashion")
    parser.add_argument("command", choices=("fetch", "subset", "thresholds"))
    parser.add_argument("--root", help="holds FashionMNIST/raw (default: EIGENDECOMP_DATA or data/downloads)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "fetch":
            print(f"four files, sha256 verified: {fetch(chosen.root)}")
        elif chosen.command == "subset":
            print(write_subset(chosen.root))
        else:
            train, test = (load(split, chosen.root) for split in ("train", "test"))
            held = {split: concepts(*data) for split, data in (("train", train), ("test", test))}
            computed = thresholds(*train)
            print(f"{'concept':16}{'threshold':>10}{'in use':>10}{'train':>8}{'test':>8}")
            for name in held["test"]:
                values = f"{computed[name]:10.4g}{RULES[name].threshold:10.4g}" if name in RULES else " " * 20
                shares = (held[split][name].float().mean().item() for split in ("train", "test"))
                print(f"{name:16}{values}" + "".join(f"{share:8.1%}" for share in shares))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
