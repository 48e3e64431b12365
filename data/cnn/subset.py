"""Write the shipped part of Fashion-MNIST: ``python data/cnn/subset.py [ROOT]``, ROOT as the loader takes it."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from eigendecomp.targets.fashion.images import CLASSES, PREFIX, SUBSET, parse_idx, raw_folder, verified


def write_subset(root: str | Path | None = None) -> Path:
    """Write the shipped subset: 2,500 images of either split, 250 of every class; returns its path.

    Tensors ``train_images`` (2500, 28, 28) and ``train_labels`` of bytes, ``train_index`` (their rows in the
    split), and the same for ``test``.
    """
    generator = torch.Generator().manual_seed(0)
    folder, tensors = raw_folder(root), {}
    for split, prefix in PREFIX.items():
        images = parse_idx(verified(folder / f"{prefix}-images-idx3-ubyte"))
        labels = parse_idx(verified(folder / f"{prefix}-labels-idx1-ubyte"))
        order = torch.randperm(len(labels), generator=generator)
        chosen = [order[labels[order] == label][:250] for label in range(len(CLASSES))]
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


if __name__ == "__main__":
    try:
        print(write_subset(*sys.argv[1:2]))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
