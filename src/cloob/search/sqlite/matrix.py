"""The vectors of one model as a mapped matrix beside the database, which can be made again from it at any time.

A file belongs to one revision of the index, and its name has the random stamp of that revision. Each vector carries the
revision in which it was written: so a newer index is the file without the rows that have gone or changed since, and
with those that were written since. These are kept in memory; when they are many, a new file is written.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cloob.search.sqlite import approximate
from cloob.search.sqlite.exact import Part, nearest
from cloob.search.sqlite.file import damaged
from cloob.search.store import Ids, Neighbours, Vectors

_PAGE = 4096
_FEW = 20_000  # vectors in memory: 40 MB at D = 512, and 10 ms of a search
_FEW_PART = 20  # or one in so many


class _File(NamedTuple):
    """A matrix; of revision 0 an empty one."""

    revision: int
    stamp: int
    rows: Part


class Parts(NamedTuple):
    """What a search looks at."""

    file: _File
    base: Part  # the rows of the file that are still as they were
    new: Part  # those written since


class Matrix:
    """One model's vectors, as the database has them."""

    def __init__(self, database: Path, model: int, dim: int, faiss: bool | None) -> None:
        self._database, self._model, self._dim, self._faiss = database, model, dim, faiss
        self._nothing = Part(np.empty(0, np.int64), np.empty((0, dim), np.float32))
        self._parts = Parts(_File(0, 0, self._nothing), self._nothing, self._nothing)
        self._seen = (0, 0)
        self._index: tuple[int, Any] = (0, None)

    def nearest(self, parts: Parts, queries: Vectors, top: int, allowed: Ids | None) -> Neighbours:
        """The items nearest to (Q, D) queries in what :meth:`parts` gave, among ascending ids if these are given."""
        base, new = (part if allowed is None else part.only(allowed) for part in parts[1:])
        searched = len(base) + len(new)
        index = self._faiss_index(parts.file) if approximate.worthwhile(len(base), self._faiss) else None
        if index is None:
            return Neighbours(*nearest([base, new], queries, top), searched)
        some = [nearest([approximate.candidates(index, base, query, top), new], query[None], top) for query in queries]
        ids, scores = (np.concatenate(each) for each in zip(*some, strict=True))
        return Neighbours(ids, scores, searched)

    def optimise(self, connection: sqlite3.Connection) -> None:
        """Writes the file anew where much has changed, and a faiss index where one is worthwhile."""
        file, base, _ = self.parts(connection, few=0)
        if approximate.worthwhile(len(base), self._faiss):
            approximate.build(self._index_name(file), base.rows)

    def remove(self) -> None:
        """Removes the files: their model has gone."""
        for path in self._files():
            with contextlib.suppress(OSError):
                path.unlink()

    def parts(self, connection: sqlite3.Connection, few: int = _FEW) -> Parts:
        """The vectors of the newest revision; a file of them where more than ``few``, and a 20th, have changed."""
        with connection:
            connection.execute("BEGIN")  # one state of the database for all that is read
            now = connection.execute("SELECT revision, stamp FROM cloob_revisions ORDER BY revision DESC").fetchone()
            if now != self._seen or few < _FEW:
                self._parts = self._follow(connection, now, few)
                self._seen = now
        return self._parts

    def _follow(self, connection: sqlite3.Connection, now: tuple[int, int], few: int) -> Parts:
        file = self._parts.file
        if not file.revision or not self._is_past(connection, file):
            fitting = (each for each in self._read() if self._is_past(connection, each))
            file = max([_File(0, 0, self._nothing), *fitting], key=lambda each: each.revision)
        kept = self._ids(connection, "<=", file.revision)
        base = file.rows.only(kept)
        if len(base) != len(kept):  # the file is not what its name says
            file, base = _File(0, 0, self._nothing), self._nothing
        new = self._ids(connection, ">", file.revision)
        changed = len(new) + len(file.rows) - len(base)
        if changed > max(few, len(file.rows) // _FEW_PART):
            file = self._write(connection, now)
            return Parts(file, file.rows, self._nothing)
        return Parts(file, base, Part(new, self._all(connection, file.revision)))

    def _ids(self, connection: sqlite3.Connection, operator: str, revision: int) -> Ids:
        statement = f"SELECT item FROM cloob_vectors WHERE model = ? AND revision {operator} ? ORDER BY item"
        return np.fromiter((row[0] for row in connection.execute(statement, (self._model, revision))), np.int64)

    def _pages(self, connection: sqlite3.Connection, after: int) -> Iterator[Vectors]:
        """The vectors that were written after a revision, by item."""
        rows = connection.execute(
            "SELECT item, vector FROM cloob_vectors WHERE model = ? AND revision > ? ORDER BY item",
            (self._model, after),
        )
        while page := list(islice(rows, _PAGE)):
            yield decode(self._database, [row[1] for row in page], [row[0] for row in page], self._dim)

    def _all(self, connection: sqlite3.Connection, after: int) -> Vectors:
        return np.concatenate([self._nothing.rows, *self._pages(connection, after)])

    def _is_past(self, connection: sqlite3.Connection, file: _File) -> bool:
        """Whether a file is of an earlier state of this very index, or of this one."""
        row = connection.execute("SELECT stamp FROM cloob_revisions WHERE revision = ?", (file.revision,)).fetchone()
        return row is not None and row[0] == file.stamp

    def _files(self) -> list[Path]:
        return list(self._database.parent.glob(f"vectors-{self._model}-*.npy"))

    def _read(self) -> Iterator[_File]:
        """The files that are whole."""
        for path in self._files():
            with contextlib.suppress(OSError, ValueError, IndexError), path.open("rb") as opened:
                revision, stamp = (int(part) for part in path.stem.split("-")[2:])
                ids = np.lib.format.read_array(opened)
                np.lib.format.read_magic(opened)
                shape, _, kind = np.lib.format.read_array_header_1_0(opened)
                rows = np.memmap(opened, kind, "r", opened.tell(), shape)
                fits = shape == (len(ids), self._dim) and kind == np.float32 and ids.dtype == np.int64
                if fits and ids[0] > 0 and (np.diff(ids) > 0).all():
                    yield _File(revision, stamp, Part(ids, np.asarray(rows)))

    def _write(self, connection: sqlite3.Connection, now: tuple[int, int]) -> _File:
        """A file of everything, in the place of all others; in memory where none can be written."""
        ids = self._ids(connection, ">", 0)
        temporary = self._database.with_name(f".tmp-{secrets.token_hex(8)}")
        old = self._files()
        try:
            # Not by a writable map: on a full disk that ends the process.
            with temporary.open("wb") as file:
                np.save(file, ids)
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), self._dim)}
                np.lib.format.write_array_header_1_0(file, header)
                for page in self._pages(connection, 0):
                    file.write(page.tobytes())
            temporary.replace(self._database.with_name(f"vectors-{self._model}-{now[0]}-{now[1]}.npy"))
            for path in old:
                path.unlink(missing_ok=True)
            return next(file for file in self._read() if (file.revision, file.stamp) == now)
        except (OSError, StopIteration):
            return _File(*now, Part(ids, self._all(connection, 0)))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _faiss_index(self, file: _File) -> Any:
        stamp, index = self._index
        if stamp != file.stamp:
            index = approximate.find(self._index_name(file), len(file.rows), self._dim)
            self._index = (file.stamp, index)
        return index

    def _index_name(self, file: _File) -> str:
        return f"{file.stamp}-{self._model}.faiss"


def decode(database: Path, cells: Sequence[Any], ids: Sequence[int], dim: int) -> Vectors:
    """(n, D) of cells of the database; InputError where one is no vector of this width and of length 1."""
    wrong = [item for item, cell in zip(ids, cells, strict=True) if not isinstance(cell, bytes) or len(cell) != 4 * dim]
    rows: Vectors = np.empty((0, dim), np.float32)
    if not wrong:
        rows = np.frombuffer(b"".join(cells), "<f4").reshape(-1, dim)
        with np.errstate(all="ignore"):
            lengths = np.einsum("nd,nd->n", rows, rows)
        wrong = np.asarray(ids)[~(np.abs(lengths - 1) < 0.05)].tolist()
    if wrong:
        raise damaged(database, f"the vector of item {wrong[0]} is none of width {dim} and length 1")
    return rows
