"""Sources of pictures: what they have in common, and what an index keeps of a row."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, read_fault
from cloob.data.sources.tables import check_name
from cloob.errors import InputError, one_line
from cloob.pictures import read_file
from cloob.search.records import Value

CAPTION_COLUMNS = ("title", "caption", "text")  # of captions, where no column is named
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
_ADDING = threading.Lock()


@dataclass(frozen=True)
class ScanOptions:
    """How tables are read."""

    image_column: str | None = None  # ``filepath`` where none is named
    caption_column: str | None = None  # ``title``, ``caption`` or ``text``


class FoundPicture(NamedTuple):
    """A picture that a source names, not opened yet."""

    path: str  # as in :class:`cloob.search.records.Item`
    bytes: int | None  # size of the file; None where only reading it tells
    mtime_ns: int | None  # see ``time_of``; None where the file is not there
    place: Any = None  # where its source finds what describes it


class Description(NamedTuple):
    caption: str | None
    columns: Mapping[str, Value]


@dataclass
class LeftOut:
    """What a source holds and an index does not: how much per reason, and the first
    few.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        with _ADDING:  # threads that read pictures add, too
            self.counts[reason] += count
            self.examples[reason] = [*self.examples.get(reason, ()), example][:3]


class ReadFailed(BadSample):
    """A picture cannot be read now (a permission, a disk); it need not be gone."""


class Collection:
    """A source of pictures, without any; several threads may call ``read`` and
    ``describe``.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # an absolute path
        self.left_out = LeftOut()  # of its scan
        # beginnings of paths that it could not list: what is known below them stays
        self.unlisted: list[str] = []

    def scan(self) -> Iterator[FoundPicture]:
        """What it names; what it leaves out is counted."""
        yield from ()

    def read(self, found: FoundPicture) -> bytes:
        """The bytes of a picture's file, see ``reading``."""
        with reading(found.path):
            return read_file(found.path)

    def describe(self, found: FoundPicture) -> Description:
        """What else it knows of a picture."""
        raise LookupError(found.path)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Inside, what cannot be read is ``BadSample`` where it is not there, else
    ``ReadFailed``.
    """
    try:
        yield
    except LookupError:
        detail = "not in its source any more"
        raise BadSample("missing image", path, detail) from None
    except (OSError, InputError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        kind = BadSample if isinstance(error, _NOT_THERE) else ReadFailed
        raise kind(read_fault(error, "missing image"), path, why) from None


def state_of(path: str) -> os.stat_result | None:
    """The state of a regular file, None where there is none; OSError where that cannot
    be known.
    """
    try:
        state = os.stat(path)  # noqa: PTH116
    except _NOT_THERE:
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def time_of(*files: os.stat_result | None) -> int:
    """When a picture and the files that describe it were changed, in nanoseconds since
    1970: the sum, so that a change of one shows.
    """
    total = sum(file.st_mtime_ns + file.st_size for file in files if file)
    return (total + 2**63) % 2**64 - 2**63  # as SQLite holds it


def caption_of(path: Path, names: Sequence[str], column: str | None) -> str | None:
    """The column of captions among those of a table: the one that is named, else a
    usual one.
    """
    if column is not None:
        check_name(path, names, column, "caption")
        return column
    return next((name for name in CAPTION_COLUMNS if name in names), None)


def values(row: Mapping[Any, Any]) -> dict[str, Value]:
    """The columns of a row as an index holds them, without those that it cannot
    hold.
    """
    columns = {str(name): _value(raw) for name, raw in row.items()}
    return {name: value for name, value in columns.items() if value is not None}


def _value(raw: Any) -> Value:
    """What an index holds of a cell; None of nothing, and of what it cannot hold."""
    if isinstance(raw, Decimal) and raw.is_finite():
        raw = int(raw) if raw == raw.to_integral_value() else float(raw)
    if isinstance(raw, int) and -(2**63) <= raw < 2**63:
        return raw
    if isinstance(raw, float):
        return raw if math.isfinite(raw) else None
    return None if raw is None or isinstance(raw, bytes) else _shown(raw)


def _shown(raw: Any) -> str | None:
    """A text, a date, a list of texts, or JSON of what is none of these."""
    if hasattr(raw, "isoformat"):
        raw = raw.isoformat()
    elif isinstance(raw, list) and all(isinstance(item, str) for item in raw):
        raw = ", ".join(raw)
    elif not isinstance(raw, str):
        try:
            raw = json.dumps(raw, default=str)
        except (TypeError, ValueError, RecursionError):
            return None
    return str(raw)[:MAX_CAPTION_BYTES]
