"""Several sources read as one, each with its weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cloob.data.batch import RawSample
from cloob.data.fingerprint import Fingerprint
from cloob.data.order import Part
from cloob.data.source import Source
from cloob.errors import InputError


@dataclass(frozen=True)
class MixedSource:
    """Several sources, one after the other, read as one.

    ``len`` is the number of stored pairs. ``weights`` are passes over each source in an epoch, see ``EpochOrder``; a
    fraction takes another part in each epoch, and without weights it is one pass over each.
    """

    parts: tuple[Source, ...]
    weights: tuple[float, ...] = ()
    _ends: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.parts):
            raise InputError(f"weights: {len(self.weights)} given for {len(self.parts)} sources; give one for each")
        for source, weight in zip(self.parts, self.weights, strict=False):
            if not 0 < weight < float("inf"):
                raise InputError(f"weights: {weight} for {source.name}; expected a positive number of passes an epoch")
            if round(weight * len(source)) == 0 < len(source):
                raise InputError(
                    f"weights: {weight} for {source.name} takes none of its {len(source):,} pairs; "
                    f"give {1 / len(source):.2g} or more, or leave it out"
                )
        object.__setattr__(self, "_ends", np.cumsum([len(part) for part in self.parts]))

    @property
    def name(self) -> str:
        """The names of the parts."""
        return " + ".join(part.name for part in self.parts)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Rows per file, over all parts."""
        return tuple(itertools.chain.from_iterable(part.shard_sizes for part in self.parts))

    @property
    def streamed(self) -> bool:
        """Whether any part is costly to read in random order."""
        return any(part.streamed for part in self.parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; raises ``BadSample`` when it cannot be used.

        An index of ``len`` or more is a further copy of the pair at ``index % len``: so the repeats that a weight asks
        for get augmentations of their own.
        """
        part, row = self._place(index)
        return self.parts[part].read(row)

    def fingerprint(self) -> Fingerprint:
        """Those of the parts."""
        return {
            f"{key} of source {i + 1}": value
            for i, part in enumerate(self.parts)
            for key, value in part.fingerprint().items()
        }

    def prefetch(self, indices: np.ndarray) -> None:
        """Passes on to the streamed parts what will be read soon."""
        indices = indices % len(self)
        owners = np.searchsorted(self._ends, indices, side="right")
        for i, part in enumerate(self.parts):
            fetch = getattr(part, "prefetch", None)
            if fetch is not None and (owners == i).any():
                fetch(indices[owners == i] - self._start(i))

    def _place(self, index: int) -> tuple[int, int]:
        row = index % len(self)
        part = int(np.searchsorted(self._ends, row, side="right"))
        return part, row - self._start(part)

    def _start(self, part: int) -> int:
        return int(self._ends[part]) - len(self.parts[part])


def mix(sources: Sequence[Source], weights: Sequence[float] = ()) -> Source:
    """One source of several; the source itself when it is alone and has no weight but 1."""
    if len(sources) == 1 and tuple(weights) in ((), (1.0,)):
        return sources[0]
    return MixedSource(tuple(sources), tuple(weights))


def parts_of(source: Source) -> tuple[Part, ...]:
    """What the order of an epoch has to know of a source."""
    sources = source.parts if isinstance(source, MixedSource) else (source,)
    weights = (source.weights if isinstance(source, MixedSource) else ()) or (1.0,) * len(sources)
    return tuple(
        Part(tuple(part.shard_sizes), weight, part.streamed) for part, weight in zip(sources, weights, strict=True)
    )
