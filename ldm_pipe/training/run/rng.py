"""Randomness as a function of (seed, purpose, step, image): no generator state to save, lose or restore."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key_seed(seed: int, *keys: str | int) -> int:
    """Hash a seed and its keys to 63 bits (BLAKE2b); the same keys give the same number on every machine."""
    text = "\x1f".join([str(int(seed)), *(str(key) for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: str | int) -> torch.Generator:
    """Make the CPU generator of one purpose, for instance `generator(seed, "noise", step, position)`."""
    return torch.Generator("cpu").manual_seed(key_seed(seed, *keys))


def batch_normal(shape: tuple[int, ...], seed: int, *keys: str | int, positions: range) -> Tensor:
    """Draw unit normals for the given positions of a global batch; row i depends on its position alone.

    Returns: (len(positions), *shape), the same rows however the batch is split over processes or accumulation.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, *keys, i)) for i in positions])


def batch_uniform(num: int, seed: int, *keys: str | int, positions: range) -> Tensor:
    """Draw `num` uniforms in [0, 1) for the given positions of a global batch: (len(positions), num), float64."""
    rows = [torch.rand(num, generator=generator(seed, *keys, i), dtype=torch.float64) for i in positions]
    return torch.stack(rows)
