"""What an index holds, and what a search answers; plain values without behaviour."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Value = str | int | float | bool | None
"""What a metadata column holds."""

_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def valid(text: str) -> str:
    """Text that databases and pages take: without NUL and without halves of surrogate pairs."""
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True)
class Item:
    """One picture of an index."""

    id: int  # positive; belongs to a source and a path for as long as the index has them
    source: str  # the SRC that it came from
    path: str  # of the file; of a picture inside a container CONTAINER::MEMBER
    content: str  # SHA-256 of the file's bytes, hex
    bytes: int  # size of the file
    mtime_ns: int | None  # of the file or the container, nanoseconds since 1970
    width: int  # of the upright picture, pixels
    height: int
    date: str | None = None  # when it was taken, ISO 8601
    caption: str | None = None
    columns: Mapping[str, Value] = field(default_factory=dict)  # what else the source says of it


@dataclass(frozen=True)
class IndexedModel:
    """A model whose vectors an index holds."""

    name: str  # what the index calls it
    spec: str  # what `cloob.load_model` takes
    fingerprint: str  # of its weights and preprocessing, hex: vectors of two fingerprints never mix
    dim: int  # D, the width of its unit rows


@dataclass(frozen=True)
class Hit:
    """One answer of a search."""

    item: Item
    score: float  # cosine with the query, in [-1, 1]
    margin: float | None = None  # above what unrelated queries reach, in standard deviations of theirs


@dataclass(frozen=True)
class Results:
    """What a search found, best first."""

    hits: tuple[Hit, ...]  # at most as many as were asked for, those above the cutoff
    searched: int  # pictures that were compared: those that the filter lets through
    cut: int  # of the nearest, as many as were asked for, those that the cutoff left out
    model: str  # the name of the model that was asked
