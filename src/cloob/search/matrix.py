"""One model's vectors as a matrix, for exact search.

A row belongs to a content, and a content to the items that name it. A vector is written
once and never changed, so a file with all rows up to one is good for as long as the
index knows, by its random stamp, the revision that had them: it is mapped, and what was
written since is read from the database. Rows that no item names are passed over.

A float32 product of unit rows (width D) is off by at most about D·2⁻²⁴, so the k best
are among the rows within twice that of the k-th best product. These are scored again
one by one: equal rows tie exactly, the lower id first.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError
from cloob.search.database import Database, mend
from cloob.search.records import IndexedModel

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_PAGE = 4096
_BLOCK = 32_768  # rows that are scored again at once: 128 MB at D = 512
_MOST_MERGED = 20_000  # rows in memory that new ones are copied together with
_FEW_PART = 20  # one in so many rows is few


class Neighbours(NamedTuple):
    """The items nearest to a query, best first."""

    ids: Ids  # (k,)
    scores: Vectors  # (k,) cosines
    searched: int  # items that the filter lets through and the model has vectors of


class Rows(NamedTuple):
    contents: Ids  # (n,) of every row
    rows: Vectors  # (n, D)


class State(NamedTuple):
    """One state of the index."""

    revision: int
    stamp: int
    last: int  # the number of its last vector


_NOTHING_READ = State(-1, 0, 0)


@dataclass(frozen=True)
class Named:
    """Items by the contents that they name, which are ascending."""

    contents: Ids  # (n,)
    items: Ids  # (n,)

    def among(self, allowed: Ids) -> Named:
        mask = is_among(self.items, allowed)
        return Named(self.contents[mask], self.items[mask])

    def expand(self, contents: Ids, scores: Vectors) -> tuple[Ids, Vectors]:
        """The items of contents, with their scores."""
        starts = np.searchsorted(self.contents, contents, "left")
        counts = np.searchsorted(self.contents, contents, "right") - starts
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        items = self.items[np.repeat(starts, counts) + within]
        return items, np.repeat(scores, counts)


class Matrix:
    def __init__(self, database: Database, model: IndexedModel) -> None:
        self._database = database
        self._model = model.number
        self._dim = model.dim
        self._blocks: list[Rows] = []
        self._masks: list[Mask] = []  # of the rows of the blocks that an item names
        self._named = Named(np.empty(0, np.int64), np.empty(0, np.int64))
        self._seen: State | None = None

    def nearest(self, query: Vectors, top: int, allowed: Ids | None) -> Neighbours:
        """The items nearest to a query (D,), of ascending ``allowed`` ids if these are
        given.
        """
        query = np.asarray(query, np.float32)
        with self._database.using() as connection, connection:
            connection.execute("BEGIN")  # one state of the database for all reads
            self._refresh(connection)
            blocks, masks, named = self._blocks, self._masks, self._named
        if allowed is not None:
            named = named.among(allowed)
            masks = [is_among(block.contents, named.contents) for block in blocks]
        products = [
            _products(block.rows, mask, query)
            for block, mask in zip(blocks, masks, strict=True)
        ]
        least = self._least(np.concatenate([_NO_SCORES, *products]), query, top)
        contents, scores = [np.empty(0, np.int64)], [_NO_SCORES]
        for block, approximate in zip(blocks, products, strict=True):
            near = np.flatnonzero((approximate >= least) & (approximate > -np.inf))
            contents.append(block.contents[near])
            scores.append(_exact(block.rows, near, query))
        items, exact = named.expand(np.concatenate(contents), np.concatenate(scores))
        order = np.lexsort((items, -exact))[:top]
        return Neighbours(items[order], exact[order], len(named.items))

    def _least(self, products: Vectors, query: Vectors, top: int) -> float:
        """The product below which no row is among the best, for all its rounding."""
        if len(products) <= top:
            return -np.inf
        margin = 2 * self._dim * 2.0**-24 * max(1.0, float(np.linalg.norm(query)))
        return float(np.partition(products, -top)[-top]) - margin

    def save(self) -> None:
        """Writes a file of all rows, if many are in none; in the place of all
        others.
        """
        with self._database.using() as connection, connection:
            connection.execute("BEGIN")
            state, saved = self._file(connection)
            count = "SELECT count(*) FROM cloob_vectors WHERE id > ? AND model = ?"
            (n_new,) = connection.execute(count, (state.last, self._model)).fetchone()
            if n_new > len(saved.contents) // _FEW_PART:
                with contextlib.suppress(OSError):  # no room: the database has the rows
                    self._write(connection)

    def _refresh(self, connection: sqlite3.Connection) -> None:
        """Reads what was written since the last look, or all of it."""
        newest = _newest(connection)
        if newest == self._seen:
            return
        if self._seen is None or not _is_known(connection, self._seen):
            self._seen, saved = self._file(connection)
            self._blocks = [saved]
        new = _joined(list(self._pages(connection, self._seen)), self._dim)
        if len(self._blocks) > 1 and len(self._blocks[-1].contents) < _MOST_MERGED:
            new = _joined([self._blocks.pop(), new], self._dim)
        if len(new.contents):
            self._blocks = [*self._blocks, new]
        self._named = self._read_named(connection)
        self._masks = [
            is_among(block.contents, self._named.contents) for block in self._blocks
        ]
        self._seen = newest

    def _pages(self, connection: sqlite3.Connection, after: State) -> Iterator[Rows]:
        """The rows that were written after a state."""
        statement = (
            "SELECT content, vector FROM cloob_vectors WHERE id > ? AND model = ?"
            " ORDER BY id"
        )
        cells = connection.execute(statement, (after.last, self._model))
        while page := cells.fetchmany(_PAGE):
            contents = np.array([content for content, _ in page], np.int64)
            vectors = [vector for _, vector in page]
            yield Rows(contents, decode(self._database.path, vectors, self._dim))

    def _read_named(self, connection: sqlite3.Connection) -> Named:
        """The items that have a vector."""
        statement = (  # as one text: 100,000 rows of Python take three times as long
            "SELECT coalesce(group_concat(content || ' ' || id, ' '), '')"
            " FROM (SELECT content, id FROM cloob_items ORDER BY content, id)"
        )
        text = connection.execute(statement).fetchone()[0]
        pairs = np.fromstring(text, np.int64, sep=" ").reshape(-1, 2)
        contents = np.ascontiguousarray(pairs[:, 0])
        mask = np.zeros(len(pairs), bool)
        for block in self._blocks:
            mask |= is_among(contents, np.sort(block.contents))
        return Named(contents[mask], pairs[mask, 1])

    def _file(self, connection: sqlite3.Connection) -> tuple[State, Rows]:
        """The newest whole file of a state of this index; of no rows where none is."""
        best = _NOTHING_READ, _joined([], self._dim)
        for path in self._paths():
            with contextlib.suppress(OSError, ValueError):
                state = State(*map(int, path.stem.split("-")[2:]))
                if state > best[0] and _is_known(connection, state):
                    best = state, self._map(path)
        return best

    def _paths(self) -> list[Path]:
        return list(self._database.path.parent.glob(f"vectors-{self._model}-*.f32"))

    def _map(self, path: Path) -> Rows:
        """The rows of a file; ValueError where it is not whole."""
        count, left = divmod(path.stat().st_size, 8 + 4 * self._dim)
        if left or not count:
            raise ValueError(path)
        contents = np.fromfile(path, "<i8", count)
        rows = np.memmap(path, "<f4", "r", 8 * count, (count, self._dim))
        return Rows(contents, np.asarray(rows))

    def _write(self, connection: sqlite3.Connection) -> None:
        """Writes the vectors of a model into a file that processes map, in the place of
        older ones.
        """
        old = self._paths()
        folder = self._database.path.parent
        name = "-".join(map(str, _newest(connection)))
        path = folder / f"vectors-{self._model}-{name}.f32"
        temporary = folder / f".tmp-{secrets.token_hex(8)}"
        statement = "SELECT content FROM cloob_vectors WHERE model = ? ORDER BY id"
        numbers = connection.execute(statement, (self._model,)).fetchall()
        try:
            # not by a writable map: on a full disk that ends the process
            with temporary.open("wb") as file:
                file.write(np.array(numbers, "<i8").tobytes())
                for page in self._pages(connection, _NOTHING_READ):
                    file.write(page.rows.tobytes())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        for other in old:
            if other != path:  # which another process may have written too
                other.unlink(missing_ok=True)


_NO_SCORES = np.empty(0, np.float32)


def _newest(connection: sqlite3.Connection) -> State:
    statement = (
        "SELECT revision, stamp, (SELECT coalesce(max(id), 0) FROM cloob_vectors)"
        " FROM cloob_revisions ORDER BY revision DESC"
    )
    return State(*connection.execute(statement).fetchone())


def _is_known(connection: sqlite3.Connection, state: State) -> bool:
    """Whether a state belongs to the history of this index."""
    statement = "SELECT 1 FROM cloob_revisions WHERE revision = ? AND stamp = ?"
    return connection.execute(statement, state[:2]).fetchone() is not None


def _joined(blocks: Sequence[Rows], dim: int) -> Rows:
    contents = [block.contents for block in blocks]
    rows = [block.rows for block in blocks]
    return Rows(
        np.concatenate([np.empty(0, np.int64), *contents]),
        np.concatenate([np.empty((0, dim), np.float32), *rows]),
    )


def is_among(ids: Ids, allowed: Ids) -> Mask:
    """Which ids are among ascending ones."""
    places = np.searchsorted(allowed, ids)
    found = places < len(allowed)
    found[found] = allowed[places[found]] == ids[found]
    return found


def decode(path: Path, cells: Sequence[bytes], dim: int) -> Vectors:
    """(n, D) of the cells of vectors."""
    if any(len(cell) != 4 * dim for cell in cells):
        raise InputError(
            f"{path}: is damaged (a vector is not of width {dim}); {mend(path.parent)}"
        )
    return np.frombuffer(b"".join(cells), "<f4").reshape(-1, dim)


def _products(rows: Vectors, mask: Mask, query: Vectors) -> Vectors:
    """Products of rows with a query; −∞ of those that are masked, and of no number."""
    if mask.sum() < len(mask) // _FEW_PART:
        products = np.full(len(mask), -np.inf, np.float32)
        products[mask] = rows[mask] @ query
    else:
        products = np.einsum("ij,j->i", rows, query)  # half of what OpenBLAS takes
    products[~mask | np.isnan(products)] = -np.inf
    return products


def _exact(rows: Vectors, places: Ids, query: Vectors) -> Vectors:
    """Products of some rows, each summed in float64."""
    scores = np.empty(len(places), np.float32)
    wide = query.astype(np.float64)
    for start in range(0, len(places), _BLOCK):
        block = places[start : start + _BLOCK]
        scores[start : start + _BLOCK] = (rows[block].astype(np.float64) * wide).sum(1)
    return scores
