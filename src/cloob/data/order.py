"""Which pairs an epoch visits, in which order, and which of them a rank takes: pure functions of numbers and seeds."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import torch

_U64 = 2**64 - 1


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order in which an epoch visits n pairs: ``(n,)`` int64, a permutation drawn from (seed, epoch)."""
    if not shuffle:
        return np.arange(n)
    return np.random.Generator(np.random.PCG64([seed & _U64, epoch])).permutation(n)


def local_part(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous part of a global batch that a rank takes; sizes differ by at most one."""
    n = len(indices)
    return indices[n * rank // world_size : n * (rank + 1) // world_size]


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator of its own for one sample in one epoch (4 µs; numpy's cost 8 to 11)."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed & _U64, epoch, index), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
