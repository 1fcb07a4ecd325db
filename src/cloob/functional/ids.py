"""Integers for ids of any kind, the same in every process and on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def ids(names: Iterable[object]) -> Tensor:
    """Integers for the ``ids`` of an objective.

    Args:
        names: Texts or integers, one per pair (captions, InChIKeys), also a tensor;
            equal ones get equal integers. Case and spaces count: ``C`` and ``c`` are
            two molecules.

    Returns:
        (N,) int64 digests, the same on all ranks, unlike Python's ``hash``.

    Raises:
        TypeError: One text, whose characters would be taken for names.

    Example:
        >>> import cloob
        >>> numbers = cloob.ids(["a red bird", "a dog", "a red bird"])
        >>> (numbers[0] == numbers[2]).item(), (numbers[0] == numbers[1]).item()
        (True, False)
    """
    if isinstance(names, str | bytes):
        raise TypeError(f"names is one text, {names!r}; a list of names is expected")
    values = names.tolist() if isinstance(names, Tensor) else names
    return torch.tensor([id_digest(str(name)) for name in values], dtype=torch.int64)


def id_digest(text: str) -> int:
    """A stable 63-bit digest of an id."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1
