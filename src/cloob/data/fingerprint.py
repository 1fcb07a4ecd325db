"""Digests of data: a source's fingerprint, by which a resumed run finds that its data are others, and cache keys.

A fingerprint is of content as far as that is cheap: a table's two columns, the names and sizes in tars and folders.
Times are no content: a copy of the data has others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cloob.data.batch import BadSample, Reader

if TYPE_CHECKING:  # models need a digest, and no pyarrow
    import pyarrow as pa

Fingerprint = dict[str, int | str]  # counts and digests, each by the name of what it is of

MAX_FILES = 100_000  # so many files of a folder are looked into at most: each costs a call, on a network a journey


def add_part(state: Any, part: str | bytes | np.ndarray) -> None:
    """Adds a part to a digest with its length, so that no two lists of parts are the same bytes."""
    part = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
    data = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else memoryview(part)
    state.update(data.nbytes.to_bytes(8, "little"))
    state.update(data)


def digest(parts: Iterable[str | bytes | np.ndarray], size: int = 8) -> str:
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        add_part(state, part)
    return state.hexdigest()


def content_key(reader: Reader) -> str:
    """A digest of all that the samples of a set consist of, in order; names and times of files do not count."""

    def parts() -> Iterator[str | bytes]:
        for index in range(len(reader)):
            try:
                sample = reader.read(index)
                key, data, *_ = sample if isinstance(sample, tuple) else (sample.key, sample.image)
                yield from (key, data, getattr(sample, "caption", ""))
            except BadSample as bad:
                yield "\0".join((bad.key, bad.reason, *bad.captions))

    return digest(parts(), size=16)


def of_column(column: pa.ChunkedArray) -> str:
    """Of a column of texts or bytes, however it is cut into chunks; a second for half a gigabyte."""
    import pyarrow as pa

    values, lengths = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    for chunk in filter(len, column.chunks):
        chunk = chunk.cast(pa.large_string()) if pa.types.is_string(chunk.type) else chunk
        chunk = chunk.cast(pa.large_binary())
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        sizes = np.diff(ends)
        sizes[chunk.is_null().to_numpy(zero_copy_only=False)] = -1
        lengths.update(sizes.data)
        if data is not None:
            values.update(memoryview(data)[int(ends[0]) : int(ends[-1])])
    return digest([values.digest(), lengths.digest()])


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """In what two fingerprints differ: counts with both values, digests by name."""
    changes = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if old != new:
            counts = isinstance(old, int) and isinstance(new, int)
            changes.append(f"{old:,} {key} before, {new:,} now" if counts else f"other {key}")
    return changes


def spread(n: int, most: int = MAX_FILES) -> list[int]:
    """All of range(n), or ``most`` of it, evenly spread."""
    count = min(n, most)
    return [i * (n - 1) // max(1, count - 1) for i in range(count)]
