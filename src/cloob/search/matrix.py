"""One model's vectors as a matrix in a mapped file, a cache for exact search.

A row belongs to a content, and a content to the items that name it. A file belongs to
one revision of the index and has its random stamp in the name; what was written since
is in memory. A float32 product of unit rows (width D) is off by at most about D·2⁻²⁴,
so the k best are among the rows within twice that of the k-th best product. These are
scored again one by one: equal rows tie exactly, the lower id first.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
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
_FEW = 20_000  # vectors in memory: 40 MB at D = 512, and 10 ms of a search
_FEW_PART = 20  # or one in so many


class Neighbours(NamedTuple):
    """The items nearest to a query, best first."""

    ids: Ids  # (k,)
    scores: Vectors  # (k,) cosines
    searched: int  # items that the filter lets through and the model has vectors of


class RowBlock(NamedTuple):
    contents: Ids  # (n,) ascending
    rows: Vectors  # (n, D)


class _File(NamedTuple):
    revision: int
    stamp: int
    contents: Ids
    rows: Vectors


@dataclass(frozen=True)
class Named:
    """Items by the contents that they name, both ascending."""

    contents: Ids  # (n,)
    items: Ids  # (n,)

    def among(self, allowed: Ids) -> Named:
        mask = is_among(self.items, allowed)
        return Named(self.contents[mask], self.items[mask])

    def expand(self, contents: Ids, scores: Vectors) -> tuple[Ids, Vectors]:
        """The items of contents, with their scores."""
        starts = np.searchsorted(self.contents, contents, "left")
        counts = np.searchsorted(self.contents, contents, "right") - starts
        parts = [
            self.items[start : start + count]
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        ]
        items = np.concatenate([np.empty(0, np.int64), *parts])
        return items, np.repeat(scores, counts)


@dataclass(frozen=True)
class Snapshot:
    """All vectors of a revision, and the items that have one."""

    blocks: tuple[RowBlock, ...]
    named: Named
    masks: list[Mask] = field(init=False)  # of the rows that an item names

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", self.masks_of(self.named))

    def masks_of(self, named: Named) -> list[Mask]:
        return [is_among(block.contents, named.contents) for block in self.blocks]


class Matrix:
    def __init__(self, database: Database, model: IndexedModel) -> None:
        self._database = database
        self._model = model.number
        self._dim = model.dim
        self._no_rows = np.empty((0, model.dim), np.float32)
        self._none = _File(0, 0, np.empty(0, np.int64), self._no_rows)
        self._file = self._none
        self._snapshot = Snapshot((), Named(self._none.contents, self._none.contents))
        self._seen: tuple[int, int] | None = None

    def nearest(self, query: Vectors, top: int, allowed: Ids | None) -> Neighbours:
        """The items nearest to a query (D,), of ascending ``allowed`` ids if these are
        given.
        """
        query = np.asarray(query, np.float32)
        snapshot = self.refresh()
        named, masks = snapshot.named, snapshot.masks
        if allowed is not None:
            named = named.among(allowed)
            masks = snapshot.masks_of(named)
        products = [
            _products(block.rows, mask, query)
            for block, mask in zip(snapshot.blocks, masks, strict=True)
        ]
        together = np.concatenate([np.empty(0, np.float32), *products])
        least = -np.inf
        if len(together) > top:
            margin = 2 * self._dim * 2.0**-24 * max(1.0, float(np.linalg.norm(query)))
            least = float(np.partition(together, -top)[-top]) - margin
        contents = [self._none.contents]
        scores = [np.empty(0, np.float32)]
        for block, some in zip(snapshot.blocks, products, strict=True):
            near = np.flatnonzero((some >= least) & (some > -np.inf))
            contents.append(block.contents[near])
            scores.append(_exact(block.rows, near, query))
        items, exact = named.expand(np.concatenate(contents), np.concatenate(scores))
        order = np.lexsort((items, -exact))[:top]
        return Neighbours(items[order], exact[order], len(named.items))

    def refresh(self, few: int | None = None) -> Snapshot:
        """The newest revision; a file of its vectors where more than ``few``, and a
        20th, have changed.
        """
        with self._database.using() as connection, connection:
            connection.execute("BEGIN")  # one state of the database for all reads
            now = connection.execute(
                "SELECT revision, stamp FROM cloob_revisions ORDER BY revision DESC"
            ).fetchone()
            if now == self._seen and few is None:
                return self._snapshot
            self._file = self._best_file(connection)
            n_new, _ = self._count(connection, ">", self._file.revision)
            n_few = _FEW if few is None else few
            if n_new > max(n_few, len(self._file.contents) // _FEW_PART):
                self._file = self._write(connection, now)
            revision = self._file.revision
            new = self._contents(connection, revision)
            rows = np.concatenate([self._no_rows, *self._pages(connection, revision)])
            blocks = (
                RowBlock(self._file.contents, self._file.rows),
                RowBlock(new, rows),
            )
            named = self._named(connection, blocks)
            self._snapshot = Snapshot(blocks, named)
            self._seen = now
        return self._snapshot

    def _best_file(self, connection: sqlite3.Connection) -> _File:
        """The newest file of this database that has no row too many.

        Rows go when a model or an old content goes, and come back with a new revision.
        """
        stamps = dict(connection.execute("SELECT revision, stamp FROM cloob_revisions"))
        files = [
            file
            for file in (self._file, *self._files())
            if stamps.get(file.revision) == file.stamp
        ]
        best = max(files, key=lambda file: file.revision, default=self._none)
        live = self._count(connection, "<=", best.revision)
        has_all = live == (len(best.contents), int(best.contents.sum()))
        return best if has_all else self._none

    def _named(
        self, connection: sqlite3.Connection, blocks: Sequence[RowBlock]
    ) -> Named:
        """The items that have a vector."""
        statement = "SELECT content, id FROM cloob_items ORDER BY content, id"
        numbers = chain.from_iterable(connection.execute(statement))
        pairs = np.fromiter(numbers, np.int64).reshape(-1, 2)
        contents = np.ascontiguousarray(pairs[:, 0])
        mask = np.zeros(len(pairs), bool)
        for block in blocks:
            mask |= is_among(contents, block.contents)
        return Named(contents[mask], pairs[mask, 1])

    def _count(
        self, connection: sqlite3.Connection, operator: str, revision: int
    ) -> tuple[int, int]:
        """How many vectors there are, and the sum of their contents' numbers."""
        statement = (
            "SELECT count(*), coalesce(sum(content), 0) FROM cloob_vectors WHERE model"
            f" = ? AND revision {operator} ?"
        )
        count, total = connection.execute(statement, (self._model, revision)).fetchone()
        return int(count), int(total)

    def _contents(self, connection: sqlite3.Connection, after: int) -> Ids:
        """The contents of vectors that were written after a revision, ascending."""
        statement = (
            "SELECT content FROM cloob_vectors WHERE model = ? AND revision > ? ORDER"
            " BY content"
        )
        rows = connection.execute(statement, (self._model, after))
        return np.fromiter(chain.from_iterable(rows), np.int64)

    def _pages(self, connection: sqlite3.Connection, after: int) -> Iterator[Vectors]:
        """The vectors that were written after a revision, by content."""
        statement = (
            "SELECT vector FROM cloob_vectors WHERE model = ? AND revision > ? ORDER BY"
            " content"
        )
        cells = connection.execute(statement, (self._model, after))
        while page := [cell for (cell,) in islice(cells, _PAGE)]:
            yield decode(self._database.path, page, self._dim)

    def _files(self) -> Iterator[_File]:
        """The complete files."""
        for path in self._database.path.parent.glob(f"vectors-{self._model}-*.f32"):
            with contextlib.suppress(OSError, ValueError):
                revision, stamp = map(int, path.stem.split("-")[2:])
                count, left = divmod(path.stat().st_size, 8 + 4 * self._dim)
                contents = np.fromfile(path, "<i8", count)
                rows = np.memmap(path, "<f4", "r", 8 * count, (count, self._dim))
                if not left and bool((np.diff(contents) > 0).all()):
                    yield _File(revision, stamp, contents, np.asarray(rows))

    def _write(self, connection: sqlite3.Connection, now: tuple[int, int]) -> _File:
        """A file of everything, in the place of all others; in memory where none can be
        written.
        """
        folder = self._database.path.parent
        old = list(folder.glob(f"vectors-{self._model}-*.f32"))
        path = folder / f"vectors-{self._model}-{now[0]}-{now[1]}.f32"
        temporary = folder / f".tmp-{secrets.token_hex(8)}"
        contents = self._contents(connection, 0)
        try:
            # not by a writable map: on a full disk that ends the process
            with temporary.open("wb") as file:
                file.write(contents.astype("<i8").tobytes())
                for page in self._pages(connection, 0):
                    file.write(page.tobytes())
            temporary.replace(path)
            for other in old:
                if other != path:  # which another process may have written too
                    other.unlink(missing_ok=True)
            return next(
                file for file in self._files() if (file.revision, file.stamp) == now
            )
        except (OSError, StopIteration):
            rows = np.concatenate([self._no_rows, *self._pages(connection, 0)])
            return _File(*now, contents, rows)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


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
