"""What a source of pictures is to an index, whatever its kind."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import zlib
from collections.abc import Collection as Paths
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatch
from typing import Any, NamedTuple

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, Reason
from cloob.errors import InputError
from cloob.pictures import Unreadable, read_file
from cloob.search.records import Value, valid

SEPARATOR = "::"
"""Between a container and a picture in it."""

NO_PICTURE = "neither bytes nor a path"
"""What a row says that holds no picture and never will."""

EXAMPLES = 3
"""So many are named of what was left out, and of the files that cannot be read."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Found(NamedTuple):
    """A picture that a source names, not opened yet.

    Attributes:
        path: As in :class:`cloob.search.records.Item`.
        bytes: Size of the file; None where only reading it tells.
        mtime_ns: When it, or what is said of it, was changed last; None where nothing says so.
        place: What its source finds it by.
    """

    path: str
    bytes: int | None
    mtime_ns: int | None
    place: Any = None

    @property
    def missing(self) -> bool:
        """Whether the source names a file that is not there."""
        return self.bytes == 0 and self.mtime_ns is None


@dataclass
class LeftOut:
    """What a source holds and an index does not: how much for each reason, and the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Counts one more."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(example)


class ReadFailed(BadSample):
    """A picture cannot be read now (a permission, a disk, a network); nothing says that it is gone."""


class Collection:
    """A source of pictures; this one has none. Several threads may call ``read`` and ``describe``.

    Attributes:
        name: What the index calls it: an absolute path, or the address as it was given.
        left_out: What the last ``scan`` left out.
        unlisted: Beginnings of paths that the last ``scan`` could not list: what is known below them stays.
    """

    def __init__(self, name: str, exclude: tuple[str, ...] = ()) -> None:
        self.name = name
        self.left_out = LeftOut()
        self.unlisted: list[str] = []
        self._exclude = exclude

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures; ``known`` are the paths that the index has of this source."""
        return iter(())

    def find(self, path: str) -> Found | None:
        """A picture inside a container, by its path."""
        return None

    def read(self, found: Found) -> bytes:
        """The bytes of a picture's file; ``ReadFailed`` if they cannot be read now, ``BadSample`` if there are none."""
        return read_regular(found.path)

    def read_again(self, found: Found, content: str) -> bytes:
        """The bytes with this SHA-256 where several are in question."""
        return self.read(found)

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """Caption and columns."""
        return None, {}

    def excluded(self, path: str) -> bool:
        """Whether a path below the source, or a part of it, is one of the globs that leave pictures out."""
        names = (path, *path.split("/")) if self._exclude else ()
        return any(fnmatch(name, pattern) for pattern in self._exclude for name in names)


Gone = Collection
"""What is left of a source that is not there any more."""


def value(raw: Any) -> Value:
    """What a source says in a column, as an index holds it; None for what it cannot hold."""
    if isinstance(raw, Decimal) and raw.is_finite():
        raw = int(raw) if raw == raw.to_integral_value() else float(raw)
    if isinstance(raw, float):
        return raw if math.isfinite(raw) else None
    if raw is None or isinstance(raw, bool):
        return raw
    if isinstance(raw, int):
        return raw if -(2**63) <= raw < 2**63 else str(raw)
    if isinstance(raw, bytes):
        return None
    if hasattr(raw, "isoformat"):
        raw = raw.isoformat()
    if isinstance(raw, list) and all(isinstance(each, str) for each in raw):
        raw = ", ".join(raw)
    if not isinstance(raw, str):
        try:
            raw = json.dumps(raw, default=str)
        except (TypeError, ValueError, RecursionError):
            return None
    return valid(str(raw))[:MAX_CAPTION_BYTES]


def values(row: Mapping[Any, Any]) -> dict[str, Value]:
    """The columns of a row that an index can hold."""
    held = {valid(str(name)): value(raw) for name, raw in row.items()}
    return {name: each for name, each in held.items() if each is not None}


def newest(file: os.stat_result, *said: os.stat_result | None) -> int:
    """One time for a file and for what describes it, which is another one when any of them is another file.

    The latest of their times to the millisecond, and below that a number made of all of them: a caption may also go, or
    come with an older time than the picture's.
    """
    states = [state for state in said if state]
    if not states:
        return file.st_mtime_ns
    latest = max(state.st_mtime_ns for state in (file, *states))
    mark = zlib.crc32(repr([(state.st_mtime_ns, state.st_size) for state in states]).encode())
    return latest - latest % 1_000_000 + mark % 1_000_000


def stated(path: str) -> os.stat_result | None:
    """The state of a regular file, None where there is none; OSError where nothing says whether there is one."""
    try:
        state = os.stat(path)  # noqa: PTH116 - a Path would cost more than the call
    except ValueError:
        return None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    return state if stat.S_ISREG(state.st_mode) else None


def named(path: str, said: os.stat_result, place: Any = None, *, called: str | None = None) -> Found:
    """A picture that a row names by a file's path: its size and time are the file's and that of the row's table."""
    try:
        state = stated(path)
    except OSError:  # reading it says why
        return Found(called or path, None, None, place)
    size, time = (0, None) if state is None else (state.st_size, newest(state, said))
    return Found(called or path, size, time, place)


def read_regular(path: str) -> bytes:
    """The bytes of a picture file, which is no pipe and no device; errors as of ``Collection.read``."""
    try:
        if stated(path) is None:
            raise BadSample("missing image", path, "no such file")
        return read_file(path)
    except Unreadable as error:
        raise BadSample("image too large", path, error.detail) from None
    except OSError as error:
        raise read_fault(path, error) from None


def read_fault(path: str, error: Exception) -> BadSample:
    """What a picture that could not be read is: not there, or not to be read now."""
    said = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:300]
    now = isinstance(error, OSError | InputError) and getattr(error, "errno", None) not in _NOT_THERE
    reason: Reason = "no permission to read" if isinstance(error, PermissionError) else "missing image"
    return (ReadFailed if now else BadSample)(reason, path, said)
