"""What an index holds, and what a search answers."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cloob.errors import InputError

INDEX_FILE = "index.sqlite"  # of an index, in its folder
SEPARATOR = "::"  # between a container and a picture in it
By = Literal["meaning", "words", "both"]
Value = str | int | float | bool | None  # what a metadata column holds
Precision = Literal["fp32", "bf16"]
Name: TypeAlias = "str | IndexedModel | None"  # of a model; None: the default one
Progress = Callable[[int, int], None] | None  # is called with what is done, and all
_WORD = re.compile(r"[^\W_]+")
_MOST = 100_000  # letters of an item that are looked through
_ASCII_WORDS = bytes(
    ord(chr(code).lower()) if chr(code).isalnum() else 32 for code in range(128)
).ljust(256)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def valid(text: str) -> str:
    """Text that databases and pages take: without NUL and without halves of surrogate
    pairs.
    """
    return (
        text if text.isprintable() else _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)
    )


class Busy(InputError):  # noqa: N818
    """Another process updates this index."""


@dataclass(frozen=True)
class Item:
    # positive; belongs to a source and a path for as long as the index has them
    id: int
    source: str  # the SRC that it came from
    path: str  # of the file; of a picture inside a container CONTAINER::MEMBER
    content: str  # SHA-256 of the file's bytes, hex
    bytes: int  # size of the file
    mtime_ns: int | None  # of the file or the container, nanoseconds since 1970
    width: int  # of the upright picture, pixels
    height: int
    date: str | None = None  # when it was taken, or what comes nearest to it, ISO 8601
    caption: str | None = None
    columns: Mapping[str, Value] = field(default_factory=dict)  # what else describes it

    @property
    def date_from(self) -> str:
        """Where its date is from: ``exif``, ``name``, a ``column``, or the ``file``;
        empty without a date.
        """
        stated = self.columns.get("date_from") or (
            "column" if self.columns.get("date") else "file"
        )
        return str(stated) if self.date else ""


def file_of(item: Item) -> Hashable | None:
    """Identifies a file under all of its names; None where it is gone or has changed
    since it was indexed.
    """
    if item.mtime_ns is None:  # elsewhere: nobody knows
        return item.path
    for path, size in (
        (item.path, item.bytes),
        (item.path.partition(SEPARATOR)[0], None),
    ):
        with contextlib.suppress(OSError, ValueError):
            state = os.stat(path)  # noqa: PTH116
            changed = (
                state.st_mtime_ns // 10** 6 > item.mtime_ns // 10** 6
                or size not in (None, state.st_size)
            )
            return (
                None
                if changed
                else (state.st_dev, state.st_ino, item.path[len(path) :])
            )
    return None


@dataclass(frozen=True)
class IndexedModel:
    name: str  # what the index calls it
    spec: str  # what `cloob.load_model` takes
    # of its weights and preprocessing, hex, and +bf16: vectors of two fingerprints
    # never mix
    fingerprint: str
    dim: int  # D, the width of its unit rows
    number: int = field(default=0, compare=False)  # in the index's tables
    replaces: int | None = field(
        default=None, compare=False
    )  # unfinished: the number of the other

    @property
    def weights(self) -> str:
        """The fingerprint of its weights and preprocessing alone."""
        return self.fingerprint.partition("+")[0]

    @property
    def precision(self) -> Precision:
        return "bf16" if self.fingerprint.endswith("+bf16") else "fp32"

    def check(self, fingerprint: str, address: str) -> None:
        """Refuses a loaded model that is not the one that an index has vectors of."""
        if fingerprint not in (self.weights, self.fingerprint):
            raise InputError(
                f"{self.name}: has other weights or another preprocessing or precision"
                f" than when {address} was indexed ({self.spec}); cloob index --model M"
                f" --out {address} with --replace-model makes its vectors anew, with"
                " --name NAME keeps both"
            )


@dataclass(frozen=True)
class FileState:
    """What an index knows of a file without opening it."""

    id: int | None  # the item's; None for a file that could not be read
    path: str
    bytes: int  # size when it was read
    mtime_ns: int | None  # when it was changed last, as of then
    content: str  # SHA-256, hex; empty where it could not be read
    fault: (
        str | None
    )  # why it could not be read; it is tried again when size or time differ
    models: tuple[int, ...]  # numbers of the models that have a vector of it


@dataclass(frozen=True)
class Hit:
    item: Item
    score: float  # cosine with the query, in [-1, 1]; NaN in a search by words
    margin: float | None = (
        None  # above what unrelated queries reach, in standard deviations of theirs
    )
    # the texts in which the query's words are: ``name``, ``caption``, or columns
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    hits: tuple[Hit, ...]  # at most ``top``, those above the cutoff
    searched: int  # pictures that were compared: those that the filter lets through
    cut: int  # of the ``top`` nearest, those that the cutoff left out
    model: str  # the name of the model


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without accents: ``IMG_1092`` is two."""
    text = text.casefold()
    if not text.isascii():
        letters = unicodedata.normalize("NFKD", text)
        text = "".join(
            letter for letter in letters if not unicodedata.combining(letter)
        )
    return _WORD.findall(text)


def texts(item: Item) -> dict[str, str]:
    """What of an item is text: its file's name, its caption, and columns."""
    columns = {
        name: value
        for name, value in item.columns.items()
        if isinstance(value, str) and name != "date_from"
    }
    return columns | {
        "name": item.path.rpartition("/")[2].rpartition(SEPARATOR)[2],
        "caption": item.caption or "",
    }


def all_words(item: Item) -> str:
    text = " ".join(texts(item).values())[:_MOST]
    return (
        text.encode().translate(_ASCII_WORDS).decode()
        if text.isascii()
        else " ".join(words(text))
    )


def places(item: Item, query: Sequence[str]) -> tuple[str, ...]:
    """In which texts of an item some of the words are, where all of them are in one or
    another.
    """
    matches = {
        name: set(query).intersection(words(text[:_MOST]))
        for name, text in texts(item).items()
    }
    has_all = set(query) == set().union(*matches.values())
    return (
        tuple(sorted(name for name, some in matches.items() if some)) if has_all else ()
    )
