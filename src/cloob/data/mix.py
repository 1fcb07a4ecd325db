"""Several sources read as one, each with its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cloob.data.batch import RawSample
from cloob.data.fingerprint import Fingerprint
from cloob.data.order import Part
from cloob.data.source import Source
from cloob.errors import InputError


class MixedSource:
    """Several sources, one after the other, read as one.

    ``len`` is the number of stored pairs. ``weights`` are passes over each source in an epoch, see ``EpochOrder``; a
    fraction takes another part in each epoch, and without weights it is one pass over each.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float] = ()) -> None:
        if weights and len(weights) != len(parts):
            raise InputError(f"weights: {len(weights)} given for {len(parts)} sources; give one for each")
        for source, weight in zip(parts, weights, strict=False):
            if not 0 < weight < float("inf"):
                raise InputError(f"weights: {weight} for {source.name}; expected a positive number of passes an epoch")
            if round(weight * len(source)) == 0 < len(source):
                raise InputError(
                    f"weights: {weight} for {source.name} takes none of its {len(source):,} pairs; "
                    f"give {1 / len(source):.2g} or more, or leave it out"
                )
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.name = " + ".join(part.name for part in parts)
        self.shard_sizes = tuple(size for part in parts for size in part.shard_sizes)
        self.streamed = any(part.streamed for part in parts)
        self._bounds = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; raises ``BadSample`` when it cannot be used.

        An index of ``len`` or more is a further copy of the pair at ``index % len``: so the repeats that a weight asks
        for get augmentations of their own.
        """
        row = index % len(self)
        part = int(self._owner(row))
        return self.parts[part].read(row - int(self._bounds[part]))

    def fingerprint(self) -> Fingerprint:
        """Those of the parts."""
        return {
            f"{key} of source {i}": value
            for i, part in enumerate(self.parts, 1)
            for key, value in part.fingerprint().items()
        }

    def prefetch(self, indices: np.ndarray) -> None:
        """Passes on to the streamed parts what will be read soon."""
        rows = indices % len(self)
        owners = self._owner(rows)
        for i, part in enumerate(self.parts):
            fetch = getattr(part, "prefetch", None)
            if fetch is not None and (owners == i).any():
                fetch(rows[owners == i] - self._bounds[i])

    def _owner(self, rows: Any) -> Any:
        """The number of the part that each row is of."""
        return np.searchsorted(self._bounds[1:], rows, side="right")


def mix(sources: Sequence[Source], weights: Sequence[float] = ()) -> Source:
    """One source of several; the source itself when it is alone and has no weight but 1."""
    if len(sources) == 1 and tuple(weights) in ((), (1.0,)):
        return sources[0]
    return MixedSource(sources, weights)


def parts_of(source: Source) -> tuple[Part, ...]:
    """What the order of an epoch has to know of a source."""
    sources, weights = (source.parts, source.weights) if isinstance(source, MixedSource) else ((source,), ())
    weights = weights or (1.0,) * len(sources)
    return tuple(Part(tuple(part.shard_sizes), w, part.streamed) for part, w in zip(sources, weights, strict=True))
