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
        """Adds a model without vectors; an equal one is left as it is.

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

    def rename(self, renames: Sequence[tuple[int, str, int | None]]) -> None:
        """Gives items another path and time: (id, path, mtime_ns). Ids and vectors stay."""

    def remove(self, ids: Sequence[int]) -> None:
        """Removes items with their vectors."""

    def write_faults(self, source: str, faults: Sequence[FileState]) -> None:
        """Notes files that could not be read, in the place of what was known of them."""

    def count(self, where: Filter | None = None) -> int:
        """How many items there are, or match."""

    def ids(self, where: Filter | None = None, *, after: int = 0, limit: int | None = None) -> Ids:
        """Ids of the items that match, ascending, above ``after``."""

    def items(self, ids: Sequence[int]) -> list[Item]:
        """Items in the order asked for; ids that are not there are left out."""

    def vectors(self, model: str, ids: Sequence[int]) -> Vectors:
        """(n, D) in the order asked for; rows of NaN where there is no vector."""

    def nearest(self, model: str, queries: Vectors, top: int, where: Filter | None = None) -> Neighbours:
        """The items nearest to each of (Q, D) queries."""
