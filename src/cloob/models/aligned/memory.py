"""Features that a frozen encoder gave before: kept by ``cloob train align``, and shared by the models of an evaluation.

A row is found by its own pixels or tokens, so it does not matter which file or set it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cloob.errors import require

_VERSION = "4"  # of what is computed and kept; another number makes the files of the old one unused
_KEY_BYTES = 16


def encoder_key(facts: Sequence[object], device: torch.device) -> str:
    """A short name for a frozen encoder by what decides over its features; kinds of devices round differently."""
    content = json.dumps([_VERSION, device.type, facts], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


def row_keys(batch: Tensor) -> Tensor:
    """(n, 16) uint8: a digest of each row of n pictures (uint8 pixels) or texts (integer tokens)."""
    rows = batch.cpu() if batch.dtype == torch.uint8 else batch.cpu().long()
    digests = [hashlib.blake2b(row.numpy().tobytes(), digest_size=_KEY_BYTES).digest() for row in rows]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, _KEY_BYTES)


class FeatureMemory:
    """What one frozen encoder gave for each row.

    Args:
        files: Where training kept features.
        kept: What to take of them, ``"images"`` or ``"texts"``.
        remember: Whether to keep what is computed, for other models on an equal encoder.

    Attributes:
        asked: Keys of the rows that features were asked for.
    """

    def __init__(self, files: Sequence[Path], kept: str, remember: bool) -> None:
        self.kept = kept
        self.asked: set[bytes] = set()
        self._remember = remember
        self._known: dict[bytes, Tensor] = {}
        self._stored: dict[bytes, tuple[Tensor, int]] = {}
        library = require("safetensors", "train")
        for path in files:
            try:
                with library.safe_open(path, framework="pt") as file:
                    features, rows = file.get_tensor(kept), file.get_tensor(f"{kept}_rows")
            except (library.SafetensorError, OSError):  # damaged, or just removed: then they are computed
                continue
            self._stored |= {key: (features, row) for row, key in enumerate(_each(rows))}

    @property
    def taken(self) -> int:
        """How many different rows came from the files."""
        return len(self.asked & self._stored.keys())

    def features(self, batch: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, F) features of n rows on the CPU; ``compute`` gives those of the rows that are new."""
        keys = _each(row_keys(batch))
        self.asked.update(keys)
        found = self._known if self._remember else {}
        new = {key: row for row, key in enumerate(keys) if key not in found and key not in self._stored}
        if new:
            found |= zip(new, compute(batch[list(new.values())]).float().cpu(), strict=True)
        return torch.stack([self._find(key, found) for key in keys])

    def _find(self, key: bytes, found: dict[bytes, Tensor]) -> Tensor:
        if key in found:
            return found[key]
        features, row = self._stored[key]
        return features[row]


def _each(rows: Tensor) -> list[bytes]:
    content = rows.numpy().tobytes()
    return [content[i : i + _KEY_BYTES] for i in range(0, len(content), _KEY_BYTES)]
