"""Seeded generators, one for each purpose."""

import zlib

import torch


def generator(seed: int, role: str) -> torch.Generator:
    """A generator for one role, so that drawing more for one purpose changes nothing for the others."""
    # torch reads only the lower 32 bits of a seed, so both must be mixed into them.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {role}".encode()))
