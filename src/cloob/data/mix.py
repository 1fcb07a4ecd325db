"""Several sources read as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cloob.data.batch import RawSample
from cloob.data.fingerprint import Fingerprint
from cloob.data.source import Source


class MixedSource:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self.name = " + ".join(part.name for part in parts)
        self.shard_sizes = tuple(size for part in parts for size in part.shard_sizes)
        self.streamed = any(part.streamed for part in parts)
        self._bounds = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, index: int) -> RawSample:
        part = int(self._owner(index))
        return self.parts[part].read(index - int(self._bounds[part]))

    def fingerprint(self) -> Fingerprint:
        numbered = enumerate((part.fingerprint() for part in self.parts), 1)
        return {f"{key} of source {i}": value for i, one in numbered for key, value in one.items()}

    def prefetch(self, indices: np.ndarray) -> None:
        owners = self._owner(indices)
        for i, part in enumerate(self.parts):
            fetch = getattr(part, "prefetch", None)
            if fetch is not None and (owners == i).any():
                fetch(indices[owners == i] - self._bounds[i])

    def _owner(self, rows: Any) -> Any:
        return np.searchsorted(self._bounds[1:], rows, side="right")


def mix(sources: Sequence[Source]) -> Source:
    return sources[0] if len(sources) == 1 else MixedSource(sources)
