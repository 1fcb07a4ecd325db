"""What an index holds, and what a search answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cloob.errors import InputError

INDEX_FILE = "index.sqlite"  # of an index, in its folder
Value = str | int | float | bool | None  # what a metadata column holds
Progress = Callable[[int, int], None] | None  # is called with what is done, and all
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def valid(text: str) -> str:
    """Text that databases and pages take: without NUL and without halves of surrogate
    pairs.
    """
    if text.isprintable():
        return text
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


class Busy(InputError):  # noqa: N818
    """Another process updates this index."""


@dataclass(frozen=True)
class Item:
    id: int  # positive; belongs to a source and a path while the index has them
    source: str  # the SRC that it came from
    path: str  # of the file
    content: str  # SHA-256 of the file's bytes, hex
    bytes: int  # size of the file
    mtime_ns: int | None  # of the file, nanoseconds since 1970
    width: int  # of the upright picture, pixels
    height: int
    date: str | None = None  # when it was taken: its column, EXIF, or the file's time
    caption: str | None = None
    columns: Mapping[str, Value] = field(default_factory=dict)  # what else describes it


@dataclass(frozen=True)
class IndexedModel:
    name: str  # what the index calls it
    spec: str  # what `cloob.load_model` takes
    fingerprint: str  # of its weights and preprocessing, hex
    dim: int  # D, the width of its unit rows
    # τ⁻¹ of its softmax; None where neither its objective nor its weights have it
    inv_tau: float | None = None


@dataclass(frozen=True)
class FileState:
    """What an index knows of a file without opening it."""

    path: str
    bytes: int  # size when it was read
    mtime_ns: int | None  # when it was changed last, as of then
    content: str = ""  # SHA-256, hex; empty where it could not be read
    id: int | None = None  # the item's; None for a file that could not be read
    # why it could not be read; it is tried again when size or time differ
    fault: str | None = None


@dataclass(frozen=True)
class Hit:
    item: Item
    score: float  # cosine with the query, in [-1, 1]
    # above what unrelated queries reach, in standard deviations of theirs
    margin: float | None = None


@dataclass(frozen=True)
class Results:
    hits: tuple[Hit, ...]  # at most ``top``, those above the cutoff
    searched: int  # pictures that were compared: those that the filter lets through
    cut: int  # of the ``top`` nearest, those that the cutoff left out
    model: str  # the name of the model
