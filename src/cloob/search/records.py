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
    """One picture of an index.

    Attributes:
        id: Positive; the picture's for as long as the index holds it.
        source: The SRC that it came from.
        path: Of the file; of a picture inside a container ``CONTAINER::MEMBER``.
        content: SHA-256 of the file's bytes, hex.
        bytes: Size of the file.
        mtime_ns: Of the file or the container, nanoseconds since 1970; None where there is none.
        width: Of the upright picture, pixels.
        height: Of the upright picture, pixels.
        date: When it was taken, ISO 8601 as EXIF says it; None where it says nothing.
        caption: None where there is none.
        columns: What else the source says of it.
    """

    id: int
    source: str
    path: str
    content: str
    bytes: int
    mtime_ns: int | None
    width: int
    height: int
    date: str | None = None
    caption: str | None = None
    columns: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexedModel:
    """A model whose vectors an index holds.

    Attributes:
        name: What the index calls it.
        spec: What :func:`cloob.load_model` takes.
        fingerprint: Of its weights and its preprocessing, hex: vectors of two fingerprints never mix.
        dim: D, the width of its unit rows.
    """

    name: str
    spec: str
    fingerprint: str
    dim: int


@dataclass(frozen=True)
class Hit:
    """One answer of a search.

    Attributes:
        item: The picture.
        score: Cosine with the query, in [-1, 1].
        margin: How far the score stands above what unrelated queries reach on this collection, in standard deviations
            of theirs; the relative cutoff compares this. None where there is no background.
    """

    item: Item
    score: float
    margin: float | None = None


@dataclass(frozen=True)
class Results:
    """What a search found, best first.

    Attributes:
        hits: At most as many as were asked for, those above the cutoff.
        searched: How many pictures were compared: those that the filter lets through.
        cut: How many of the nearest, as many as were asked for, the cutoff left out; when ``hits`` is empty and this is
            not 0, nothing fits.
        model: The name of the model that was asked.
    """

    hits: tuple[Hit, ...]
    searched: int
    cut: int
    model: str
