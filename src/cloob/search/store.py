"""What keeps an index: the interface that SQLite and PostgreSQL share.

Legend: n items, Q queries, D the width of a model's vectors. Vectors are float32 unit rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cloob.search.records import IndexedModel, Item
from cloob.search.where import Filter

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FileState:
    """What the index knows of a file without opening it.

    Attributes:
        id: The item's; None for a file that could not be read.
        path: As in :class:`Item`.
        bytes: Size when it was read.
        mtime_ns: When it was changed last, as of then.
        content: SHA-256, hex; empty where it could not be read.
        fault: Why it could not be read; None where it could. It is tried again when size or time differ.
        models: Names of the models that have a vector of it.
    """

    id: int | None
    path: str
    bytes: int
    mtime_ns: int | None
    content: str
    fault: str | None
    models: tuple[str, ...]


class Neighbours(NamedTuple):
    """The nearest items of each query, best first; rows end with id 0 and score −inf where fewer items match.

    Attributes:
        ids: (Q, top).
        scores: (Q, top) float32 cosines.
        searched: Items that the filter lets through and the model has vectors of.
    """

    ids: Ids
    scores: Vectors
    searched: int


class Store(Protocol):
    """Rows, metadata and vectors of one index. Each call that writes is one transaction: all of it or nothing."""

    @property
    def address(self) -> str:
        """What opens it again; of a database without the password."""

    def close(self) -> None:
        """Ends the connection."""

    def revision(self) -> int:
        """Grows with each committed change: caches and servers look here whether to read again."""

    def models(self) -> tuple[IndexedModel, ...]:
        """All models, in the order in which they came."""

    def add_model(self, model: IndexedModel) -> None:
        """Adds a model without vectors; one of the same weights gets the new place that it is loaded from.

        Raises:
            InputError: The name stands for another fingerprint.
        """

    def remove_model(self, name: str) -> None:
        """Removes a model and its vectors."""

    def states(self, source: str) -> Iterator[FileState]:
        """What is known of a source's files."""

    def write(self, items: Sequence[Item], model: str, vectors: Vectors) -> None:
        """Adds items, or replaces those of the same source and path, with their vectors of one model.

        Args:
            items: n; ``id`` 0 for a new one. A replaced item keeps its id and loses other models' vectors where its
                content differs.
            model: The name of a model that was added.
            vectors: (n, D).
        """

    def update_items(self, items: Sequence[Item]) -> None:
        """Writes anew what is known of items that are there, found by id: path, time, metadata. Vectors stay.

        An item whose path another one has by now takes that one's place.
        """

    def remove(self, ids: Sequence[int]) -> None:
        """Removes items with their vectors."""

    def write_faults(self, source: str, faults: Sequence[FileState]) -> None:
        """Notes files that could not be read, in the place of what was known of them."""

    def clear_faults(self, source: str, paths: Sequence[str]) -> None:
        """Forgets files that could not be read: they are gone."""

    def sources(self) -> tuple[str, ...]:
        """All sources that there are items or faults of, sorted."""

    def exclude(self, source: str) -> tuple[str, ...]:
        """The globs that an update leaves out of a source unless it is given others."""

    def set_exclude(self, source: str, globs: Sequence[str]) -> None:
        """Replaces them."""

    def columns(self) -> dict[str, str]:
        """The metadata columns beside an item's own by name, sorted, each with its :func:`column_kind`."""

    def find(self, contents: Sequence[str]) -> dict[str, list[int]]:
        """Ids of the items that have these SHA-256, ascending; a content that no item has is left out."""

    def count(self, where: Filter | None = None) -> int:
        """How many items there are, or match."""

    def ids(self, where: Filter | None = None, *, after: int = 0, limit: int | None = None) -> Ids:
        """Ids of the items that match, ascending, above ``after``."""

    def last_id(self) -> int:
        """The largest id; 0 where there is none."""

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for; ids that are not there are left out."""

    def vectors(self, model: str, ids: Sequence[int]) -> Vectors:
        """(n, D) in the order asked for; rows of NaN where there is no vector."""

    def optimise(self) -> None:
        """After an update: whatever makes searches fast."""

    def nearest(self, model: str, queries: Vectors, top: int, where: Filter | None = None) -> Neighbours:
        """The items nearest to each of (Q, D) queries."""


def column_kind(text: bool, number: bool, boolean: bool) -> str:
    """``"text"``, ``"number"`` or ``"boolean"``, where a column holds one of these alone; else ``"mixed"``."""
    if text + number + boolean > 1:
        return "mixed"
    return "text" if text else "boolean" if boolean else "number"
