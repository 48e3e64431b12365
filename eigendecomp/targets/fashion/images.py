"""Fashion-MNIST: fetching, checking and reading the data.

Images are float32 in [0, 1] with shape (n, 1, 28, 28), bright garments on an exactly black background; labels
are int64 with shape (n,). The four unpacked IDX files lie in ``ROOT/FashionMNIST/raw``, as torchvision keeps
them, and their sha256 is checked whenever they are read. ``ROOT`` is the argument ``root``, or else the
environment variable EIGENDECOMP_DATA, or else ``data/downloads`` in the repository.

    python -m eigendecomp.targets.fashion.images fetch   # torchvision's download, else Debian's package
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
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor

Split = Literal["train", "test"]

DATA = Path(__file__).resolve().parents[3] / "data"
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
REMEDIES = f"""  1. python -m eigendecomp.targets.fashion.images fetch
     (torchvision's download where the network allows; else `apt-get download {DEBIAN_PACKAGE}`, without root)
  2. put the four unpacked IDX files into ROOT/FashionMNIST/raw and set EIGENDECOMP_DATA=ROOT"""


# ---------------------------------------------------------------------------------------------------- reading


def parse_idx(raw: bytes, name: str = "IDX data") -> UInt8[Tensor, "..."]:
    """The array in the bytes of an unpacked IDX file of unsigned bytes, in its own shape.

    Raises ValueError, naming the file, for packed data, another element type, or a length that is not the header's.
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


def verified(path: Path) -> bytes:
    """The file's bytes, once their sha256 is the one of its name in ``SHA256``.

    Raises ValueError that names the file and both sums.
    """
    raw = path.read_bytes()
    expected, actual = SHA256[path.name], hashlib.sha256(raw).hexdigest()
    if actual != expected:
        raise ValueError(
            f"{path} is damaged or another file: its sha256 is {actual}, expected {expected}; "
            "delete it and run: python -m eigendecomp.targets.fashion.images fetch"
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
                "whole data, run: python data/cnn/subset.py"
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


def main(arguments: list[str] | None = None) -> None:
    """The command line: ``fetch``."""
    parser = argparse.ArgumentParser(prog="python -m eigendecomp.targets.fashion.images")
    parser.add_argument("command", choices=("fetch",))
    parser.add_argument("--root", help="holds FashionMNIST/raw (default: EIGENDECOMP_DATA or data/downloads)")
    try:
        print(f"four files, sha256 verified: {fetch(parser.parse_args(arguments).root)}")
    except OSError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
