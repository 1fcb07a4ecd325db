"""What a source of pairs is, several of them as one, and a part of one; the endings of pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from cloob.data.batch import RawSample, Reader
from cloob.data.fingerprint import Fingerprint, digest

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl")
CAPTION_EXTENSIONS = ("txt", "caption")
IMAGE_SUFFIXES = tuple(f".{ext}" for ext in IMAGE_EXTENSIONS)
RAW_SUFFIXES = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
"""Of cameras' files, which are indexed by the JPEG inside; nobody trains on them."""
CAPTION_SUFFIXES = tuple(f".{ext}" for ext in CAPTION_EXTENSIONS)


class Source(Reader, Protocol):
    """Pairs by number. Picklable, cheap to copy into a worker, and safe to read from several processes.

    ``shard_sizes`` are the numbers of consecutive rows that lie in one file; they add up to ``len``. A source may also
    have ``prefetch(indices)``: the loader calls it with the numbers of pairs that will be read soon.
    """

    @property
    def shard_sizes(self) -> tuple[int, ...]: ...

    @property
    def streamed(self) -> bool:
        """Whether reading in random order is costly: the loader then reads file by file."""

    def fingerprint(self) -> Fingerprint:
        """What the source holds, in a few named digests and counts: equal for equal data, wherever they lie."""

    def read(self, index: int) -> RawSample: ...


def prefetch(source: Source, indices: np.ndarray) -> None:
    """Asks for the files of some pairs, where a source prepares them in the background."""
    if hasattr(source, "prefetch"):
        source.prefetch(indices)


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
            prefetch(part, indices[owners == i] - self._bounds[i])

    def _owner(self, rows: Any) -> Any:
        return np.searchsorted(self._bounds[1:], rows, side="right")


def mix(sources: Sequence[Source]) -> Source:
    return sources[0] if len(sources) == 1 else MixedSource(sources)


def pictures_of(source: Any) -> np.ndarray | None:
    """(N,) int64, equal for rows of a source that name the same picture; None where each row is a picture."""
    if isinstance(source, Subset):
        whole = pictures_of(source.whole)
        return None if whole is None else whole[source.rows]
    pictures: np.ndarray | None = source.pictures() if hasattr(source, "pictures") else None
    return pictures


class Pictures:
    """The pictures of a source, in the order of their first rows, and the rows of each; see :func:`pictures_of`."""

    def __init__(self, parts: Sequence[np.ndarray | None], sizes: Sequence[int]) -> None:
        self.counts: list[int] = []  # pictures of each part
        rows, ends = [], []
        for same, size, first_row in zip(parts, sizes, np.cumsum([0, *sizes]).tolist(), strict=False):
            same = np.arange(size) if same is None else same
            _, first, which, counts = np.unique(same, return_index=True, return_inverse=True, return_counts=True)
            order = np.argsort(first)
            place = np.empty_like(order)
            place[order] = np.arange(len(order))
            rows.append(first_row + np.argsort(place[which], kind="stable"))
            ends.append(first_row + np.cumsum(counts[order]))
            self.counts.append(len(order))
        self._rows, self._bounds = np.concatenate(rows), np.concatenate([[0], *ends])

    def rows(self, picture: int) -> np.ndarray:
        """The rows of a picture, ascending int64."""
        return self._rows[self._bounds[picture] : self._bounds[picture + 1]]

    def first(self, pictures: np.ndarray) -> np.ndarray:
        first: np.ndarray = self._rows[self._bounds[pictures]]
        return first


class Subset:
    """Some rows of a source, ascending int64; ``part`` says which they are: ``training`` or ``held out``."""

    def __init__(self, whole: Source, rows: np.ndarray, part: str) -> None:
        self.whole, self.rows, self.part = whole, rows, part
        self.name, self.streamed = f"{whole.name} ({part})", whole.streamed
        # Rows that are left of each file; files of which nothing is left do not count.
        ends = np.searchsorted(rows, np.cumsum(whole.shard_sizes))
        self.shard_sizes = tuple(size for start, end in pairwise([0, *ends.tolist()]) if (size := end - start))

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> Fingerprint:
        return {**self.whole.fingerprint(), "pairs": len(self), f"rows that are {self.part}": digest([self.rows])}

    def read(self, index: int) -> RawSample:
        return self.whole.read(int(self.rows[index]))

    def prefetch(self, indices: np.ndarray) -> None:
        prefetch(self.whole, self.rows[indices])
