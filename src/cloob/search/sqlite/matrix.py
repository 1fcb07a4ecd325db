"""The vectors of one model as a mapped matrix beside the database, which can be made again from it at any time.

The matrix belongs to one revision of the index. Each vector carries the revision in which it was written: so a newer
index is the matrix without the rows that have gone or changed since, and with those that were written since. As long
as these are few they are kept in memory beside it; when they are many the file is written anew, whole.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from cloob.files import open_regular
from cloob.search.sqlite import approximate
from cloob.search.sqlite.exact import Part, nearest
from cloob.search.sqlite.file import Connection, damaged, size_of
from cloob.search.store import Ids, Neighbours, Vectors

_MAGIC = b"cloobvec"
_HEADER = struct.Struct("<8sQQqqqq")  # magic, n, D, identity, model, revision, stamp
_HEAD_BYTES = 4096
_PAGE = 4096
_FEW = 20_000  # vectors beside the file: 40 MB at D = 512, and 10 ms of a search
_FEW_PART = 0.05


class Key(NamedTuple):
    """Of what a matrix is: the index, the model's number, and the revision with its stamp."""

    identity: int
    model: int
    revision: int
    stamp: int


class Matrix(NamedTuple):
    """The vectors of a revision.

    Attributes:
        key: Of the file, or of the matrix in memory.
        base: What the file holds; its ``positions`` leave out what has gone since.
        extra: What was written since.
    """

    key: Key
    base: Part
    extra: Part


class MatrixCache:
    """One model's vectors, as the database has them now."""

    def __init__(self, database: Path, model: int, dim: int, faiss: bool | None) -> None:
        """Reads nothing yet.

        Args:
            database: The file; the matrix lies beside it.
            model: The model's number.
            dim: D.
            faiss: Whether a search may be approximate; None: above ``approximate.EXACT_UP_TO`` vectors.
        """
        self._database = database
        self._file = database.with_name(f"vectors-{model}.f32")
        self._model, self._dim = model, dim
        self._faiss = faiss
        self._lock = threading.Lock()
        self._matrix: Matrix | None = None
        self._revision = -1
        self._index: tuple[Key, Any] | None = None

    def nearest(self, connection: Connection, queries: Vectors, top: int, allowed: Ids | None) -> Neighbours:
        """The items nearest to (Q, D) queries, among those of ascending ids if these are given."""
        with self._lock:
            matrix = self._update(connection, whole=False)
        parts = [part if allowed is None else part.only(allowed) for part in (matrix.base, matrix.extra)]
        searched = sum(map(len, parts))
        index = self._faiss_index(matrix) if approximate.worthwhile(len(parts[0]), self._faiss) else None
        exact = index is None
        found = nearest(parts, queries, top) if exact else approximate.nearest(index, parts, queries, top)
        return Neighbours(*found, searched)

    def refresh(self, connection: Connection) -> None:
        """Writes the file anew if it does not have everything, and a faiss index where one is worthwhile."""
        with self._lock:
            matrix = self._update(connection, whole=True)
        if approximate.worthwhile(len(matrix.base), self._faiss):
            approximate.build(_name(matrix.key), matrix.base.rows)

    def remove(self) -> None:
        """Removes the file: its model has gone."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    def _faiss_index(self, matrix: Matrix) -> Any:
        with self._lock:
            if self._index is None or self._index[0] != matrix.key:
                index = approximate.find(_name(matrix.key), len(matrix.base.ids), self._dim)
                self._index = None if index is None else (matrix.key, index)
            return None if self._index is None else self._index[1]

    def _update(self, connection: Connection, *, whole: bool) -> Matrix:
        """The vectors as the database has them now."""
        connection.execute("BEGIN")  # one state of the database for all that is read
        try:
            key = self._key(connection)
            matrix = self._matrix
            if matrix is None or self._revision != key.revision or matrix.key.identity != key.identity:
                matrix = self._follow(connection, key)
            changed = len(matrix.extra) + len(matrix.base.ids) - len(matrix.base)
            if changed > max(_FEW, _FEW_PART * len(matrix.base.ids)) or (whole and changed):
                matrix = self._write(connection, key, matrix)
            connection.check()
            self._matrix, self._revision = matrix, key.revision
            return matrix
        finally:
            connection.execute("COMMIT")

    def _key(self, connection: Connection) -> Key:
        first, last = (
            connection.execute(f"SELECT revision, stamp FROM revisions ORDER BY revision {way} LIMIT 1").fetchone()
            or (0, 0)
            for way in ("ASC", "DESC")
        )
        return Key(first[1], self._model, last[0], last[1])

    def _follow(self, connection: Connection, key: Key) -> Matrix:
        """The matrix that is there, brought up to date; an empty one to start with if none fits."""
        base = self._matrix if self._matrix is not None and self._is_past(connection, self._matrix.key, key) else None
        if base is None:
            base = self._read()
            if base is None or not self._is_past(connection, base.key, key):
                base = _empty(Key(key.identity, self._model, 0, 0), self._dim)
        rows = connection.execute(
            "SELECT item FROM vectors WHERE model = ? AND revision <= ? ORDER BY item", (self._model, base.key.revision)
        )
        kept = np.fromiter((row[0] for row in rows), np.int64)
        whole = Part(base.base.ids, base.base.rows)
        alive = whole if np.array_equal(kept, whole.ids) else whole.only(kept)
        if len(alive) != len(kept):  # the file is not what it says
            return self._follow_anew(connection, key)
        number = connection.execute(
            "SELECT count(*) FROM vectors WHERE model = ? AND revision > ?", (self._model, base.key.revision)
        ).fetchone()[0]
        if number > max(_FEW, _FEW_PART * len(whole.ids)):
            return self._write(connection, key, Matrix(base.key, alive, _empty(key, self._dim).extra))
        cursor = connection.execute(
            "SELECT item, vector FROM vectors WHERE model = ? AND revision > ? ORDER BY item",
            (self._model, base.key.revision),
        )
        return Matrix(base.key, alive, Part(*read_vectors(connection, cursor, self._dim)))

    def _follow_anew(self, connection: Connection, key: Key) -> Matrix:
        return self._write(connection, key, _empty(Key(key.identity, self._model, 0, 0), self._dim))

    def _is_past(self, connection: Connection, past: Key, now: Key) -> bool:
        """Whether a key is one of this very index, at an earlier revision or the same."""
        if past[:2] != now[:2]:
            return False
        row = connection.execute("SELECT stamp FROM revisions WHERE revision = ?", (past.revision,)).fetchone()
        return past.revision == 0 or (row is not None and row[0] == past.stamp)

    def _read(self) -> Matrix | None:
        """What the file holds if it is whole."""
        try:
            with open_regular(self._file) as file:
                magic, n, dim, *key = _HEADER.unpack(file.read(_HEADER.size))
                size = os.fstat(file.fileno()).st_size
                if magic != _MAGIC or dim != self._dim or size != _size(n, dim):
                    return None
                ids, rows = _mapped(file, n, dim, "r")  # not by its name, which may be another file's by now
        except (OSError, ValueError, struct.error):
            return None
        if n and (ids[0] < 1 or not (np.diff(ids) > 0).all()):
            return None
        return Matrix(Key(*key), Part(ids, rows), _empty(Key(*key), dim).extra)

    def _write(self, connection: Connection, key: Key, matrix: Matrix) -> Matrix:
        """A matrix of everything, in a new file; in memory where none can be written."""
        rows = connection.execute("SELECT item FROM vectors WHERE model = ? ORDER BY item", (self._model,))
        ids = np.fromiter((row[0] for row in rows), np.int64)
        if 4 * len(ids) * self._dim > size_of(connection):
            raise damaged(self._database, "it refers to one vector again and again")
        temporary = self._file.with_name(f".tmp-{self._file.name}-{os.getpid()}-{threading.get_ident()}")
        try:
            with temporary.open("wb") as file:
                file.write(_HEADER.pack(_MAGIC, len(ids), self._dim, *key))
                file.truncate(_size(len(ids), self._dim))
                file.flush()
                _take_room(file.fileno(), _size(len(ids), self._dim))
            target_ids, target = _mapped(temporary, len(ids), self._dim, "r+")
        except OSError:
            temporary.unlink(missing_ok=True)
            target_ids, target = np.empty(len(ids), np.int64), np.empty((len(ids), self._dim), np.float32)
        try:
            target_ids[:] = ids
            self._fill(connection, ids, target, matrix)
            if temporary.exists():
                if isinstance(target, np.memmap):
                    target.flush()
                    target_ids, target = _mapped(temporary, len(ids), self._dim, "r")
                connection.check()
                temporary.replace(self._file)
        except OSError:  # it cannot be given its name: the map stays, the file goes
            pass
        finally:
            temporary.unlink(missing_ok=True)
        return Matrix(key, Part(target_ids, target), _empty(key, self._dim).extra)

    def _fill(self, connection: Connection, ids: Ids, target: Vectors, matrix: Matrix) -> None:
        base = matrix.base
        positions = np.arange(len(base.ids)) if base.positions is None else base.positions
        for start in range(0, len(positions), _PAGE):
            some = positions[start : start + _PAGE]
            target[np.searchsorted(ids, base.ids[some])] = base.rows[some]
        cursor = connection.execute(
            "SELECT item, vector FROM vectors WHERE model = ? AND revision > ? ORDER BY item",
            (self._model, matrix.key.revision),
        )
        while True:
            found, vectors = read_vectors(connection, islice(cursor, _PAGE), self._dim)
            if not len(found):
                return
            target[np.searchsorted(ids, found)] = vectors


def read_vectors(connection: Connection, rows: Iterable[tuple[int, bytes]], dim: int) -> tuple[Ids, Vectors]:
    """Ids and vectors of rows of the database.

    Raises:
        InputError: One is no finite vector of this width and of length 1; or they are more than the database holds, as
            where one of a few stands in many rows.
    """
    most, numbers, blobs, wrong = 0, [], [], []
    for number, blob in rows:
        if not isinstance(blob, bytes) or len(blob) != 4 * dim:
            wrong.append(number)
            continue
        numbers.append(number)
        blobs.append(blob)
        held = 4 * dim * len(blobs)
        if held > most and held > (most := size_of(connection)):  # of the state that is being read
            raise damaged(connection.path, "it refers to one vector again and again")
    ids = np.array(numbers, np.int64)
    vectors: Vectors = np.frombuffer(b"".join(blobs), "<f4").reshape(len(blobs), dim)
    with np.errstate(all="ignore"):
        lengths = np.einsum("nd,nd->n", vectors, vectors)
    wrong += ids[~(np.abs(lengths - 1) < 0.05)].tolist()
    if wrong:
        what = f"the vector of item {wrong[0]} is none of width {dim} and length 1; {len(wrong):,} are wrong"
        raise damaged(connection.path, what)
    return ids, vectors.astype(np.float32, copy=False)


def _empty(key: Key, dim: int) -> Matrix:
    part = Part(np.empty(0, np.int64), np.empty((0, dim), np.float32))
    return Matrix(key, part, part)


def _size(n: int, dim: int) -> int:
    return _HEAD_BYTES + 8 * n + 4 * n * dim


def _take_room(file: int, size: int) -> None:
    """Has a full disk complain now: it would end the process when the map is written to."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def _mapped(file: Path | IO[bytes], n: int, dim: int, mode: Any) -> tuple[Ids, Vectors]:
    """Ids and rows of a file, which a map of nothing would refuse."""
    if n == 0:
        return np.empty(0, np.int64), np.empty((0, dim), np.float32)
    ids = np.memmap(file, np.int64, mode, _HEAD_BYTES, (n,))
    return ids, np.memmap(file, np.float32, mode, _HEAD_BYTES + 8 * n, (n, dim))


def _name(key: Key) -> str:
    return f"{key.identity}-{key.model}-{key.revision}-{key.stamp}.faiss"
