"""The vectors of one model in a mapped file next to the database, and exact search in them.

A file belongs to one revision of the index and has its random stamp in the name; what was written since is in memory.
A float32 product of unit rows (width D) is off by at most about D·2⁻²⁴, so the k best are among the rows within twice
that of the k-th best product. These are scored again one by one: equal rows tie exactly, the lower id first.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cloob.search.records import IndexedModel
from cloob.search.store import Ids, Neighbours, Vectors

_PAGE = 4096
_BLOCK = 32_768  # rows that are scored again at once: 128 MB at D = 512
_FEW = 20_000  # vectors in memory: 40 MB at D = 512, and 10 ms of a search
_FEW_PART = 20  # or one in so many


class RowBlock(NamedTuple):
    ids: Ids  # (n,) ascending
    rows: Vectors  # (n, D)
    live: npt.NDArray[np.bool_]  # (n,): the others have gone or changed


class _File(NamedTuple):
    revision: int
    stamp: int
    ids: Ids
    rows: Vectors


class Matrix:
    """One model's vectors, as the database has them."""

    def __init__(self, store: Any, model: IndexedModel) -> None:
        self._store, self._model, self._dim = store, model.number, model.dim
        self._none = _File(0, 0, np.empty(0, np.int64), np.empty((0, model.dim), np.float32))
        self._file = self._none
        self._parts: list[RowBlock] = []
        self._seen: tuple[int, int] | None = None

    def nearest(self, query: Vectors, top: int, allowed: Ids | None) -> Neighbours:
        """The rows nearest to a query (D,), of ascending ``allowed`` ids if these are given."""
        query, parts = np.asarray(query, np.float32), self.parts()
        kept = [part.live if allowed is None else part.live & _among(part.ids, allowed) for part in parts]
        products = []
        for part, live in zip(parts, kept, strict=True):
            if live.sum() < len(live) // _FEW_PART:
                some = np.full(len(live), -np.inf, np.float32)
                some[live] = part.rows[live] @ query
            else:
                some = np.einsum("ij,j->i", part.rows, query)  # half of what OpenBLAS takes
            some[~live | np.isnan(some)] = -np.inf
            products.append(some)
        together, least = np.concatenate(products), -np.inf
        if len(together) > top:
            margin = 2 * self._dim * 2.0**-24 * max(1.0, float(np.linalg.norm(query)))
            least = float(np.partition(together, -top)[-top]) - margin
        ids, scores = [], []
        for part, some in zip(parts, products, strict=True):
            near = np.flatnonzero((some >= least) & (some > -np.inf))
            for start in range(0, len(near), _BLOCK):
                block = near[start : start + _BLOCK]
                ids.append(part.ids[block])
                scores.append((part.rows[block].astype(np.float64) * query.astype(np.float64)).sum(1))
        near, exact = np.concatenate([self._none.ids, *ids]), np.concatenate([np.empty(0), *scores]).astype(np.float32)
        order = np.lexsort((near, -exact))[:top]
        return Neighbours(near[order], exact[order], int(sum(live.sum() for live in kept)))

    def parts(self, few: int | None = None) -> list[RowBlock]:
        """The vectors of the newest revision; a file of them where more than ``few``, and a 20th, have changed."""
        with self._store.using() as connection, connection:
            connection.execute("BEGIN")  # one state of the database for all that is read
            now = connection.execute("SELECT revision, stamp FROM cloob_revisions ORDER BY revision DESC").fetchone()
            if now == self._seen and few is None:
                return self._parts
            stamps = dict(connection.execute("SELECT revision, stamp FROM cloob_revisions"))
            files = (each for each in [self._file, *self._files()] if stamps.get(each.revision) == each.stamp)
            file = max(files, key=lambda each: each.revision, default=self._none)
            kept = self._ids(connection, "<=", file.revision)
            live = _among(file.ids, kept)
            if live.sum() != len(kept):  # the file is of something else
                file, live = self._none, np.empty(0, np.bool_)
            new = self._ids(connection, ">", file.revision)
            if len(new) + int((~live).sum()) > max(_FEW if few is None else few, len(file.ids) // _FEW_PART):
                file, live, new = self._write(connection, now), np.ones(len(kept) + len(new), np.bool_), new[:0]
            rows = np.concatenate([self._none.rows, *self._pages(connection, file.revision)])
            self._file, self._seen = file, now
            self._parts = [RowBlock(file.ids, file.rows, live), RowBlock(new, rows, np.ones(len(new), np.bool_))]
        return self._parts

    def _ids(self, connection: sqlite3.Connection, operator: str, revision: int) -> Ids:
        statement = f"SELECT item FROM cloob_vectors WHERE model = ? AND revision {operator} ? ORDER BY item"
        return np.fromiter((row[0] for row in connection.execute(statement, (self._model, revision))), np.int64)

    def _pages(self, connection: sqlite3.Connection, after: int) -> Iterator[Vectors]:
        """The vectors that were written after a revision, by item."""
        cells = connection.execute(
            "SELECT vector FROM cloob_vectors WHERE model = ? AND revision > ? ORDER BY item", (self._model, after)
        )
        while page := [cell for (cell,) in islice(cells, _PAGE)]:
            yield self._store._decode(page, self._dim)

    def _files(self) -> Iterator[_File]:
        """The complete files."""
        for path in self._store.path.parent.glob(f"vectors-{self._model}-*.f32"):
            with contextlib.suppress(OSError, ValueError):
                revision, stamp = map(int, path.stem.split("-")[2:])
                count, left = divmod(path.stat().st_size, 8 + 4 * self._dim)
                ids = np.fromfile(path, "<i8", count)
                rows = np.memmap(path, "<f4", "r", 8 * count, (count, self._dim))
                if not left and ids[0] > 0 and (np.diff(ids) > 0).all():
                    yield _File(revision, stamp, ids, np.asarray(rows))

    def _write(self, connection: sqlite3.Connection, now: tuple[int, int]) -> _File:
        """A file of everything, in the place of all others; in memory where none can be written."""
        ids, old = self._ids(connection, ">", 0), [*self._store.path.parent.glob(f"vectors-{self._model}-*.f32")]
        path = self._store.path.with_name(f"vectors-{self._model}-{now[0]}-{now[1]}.f32")
        temporary = self._store.path.with_name(f".tmp-{secrets.token_hex(8)}")
        try:
            with temporary.open("wb") as file:  # not by a writable map: on a full disk that ends the process
                file.write(ids.astype("<i8").tobytes())
                for page in self._pages(connection, 0):
                    file.write(page.tobytes())
            temporary.replace(path)
            for other in old:
                if other != path:  # which another process may have written too
                    other.unlink(missing_ok=True)
            return next(file for file in self._files() if (file.revision, file.stamp) == now)
        except (OSError, StopIteration):
            return _File(*now, ids, np.concatenate([self._none.rows, *self._pages(connection, 0)]))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _among(ids: Ids, allowed: Ids) -> npt.NDArray[np.bool_]:
    places = np.searchsorted(allowed, ids)
    matches = places < len(allowed)
    matches[matches] = allowed[places[matches]] == ids[matches]
    return matches
