"""Rows in files that are prepared before they are read; Parquet becomes Arrow in the
cache, which is mapped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cloob.cache import Cache
from cloob.data.batch import BadSample, RawSample, Reason, clean_caption, read_pair_file
from cloob.data.source import Fingerprint, digest, of_column
from cloob.errors import InputError, first_of, one_line
from cloob.pictures import MAX_IMAGE_BYTES

T = TypeVar("T")

# for which a file that could not be opened is not tried again: all its rows would wait
_FAILED_SECONDS = 60.0
_DOWNLOADS = 2  # at the same time, by every process
_LOST = (
    errno.ENOENT,
    errno.ENOSPC,
    errno.EDQUOT,
)  # what the cache has removed, or has no room for
ARROW_SUFFIXES = (".arrow", ".parquet")
NO_PICTURE = "neither bytes nor a path"  # of a row without a picture

_DEFAULTS = ("filepath", "title")  # of open_source: columns that the user has not named
_BINARY = (pa.binary(), pa.large_binary())
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
_MAGIC = b"ARROW1"  # a file begins so; a stream has none
_ROWS = 64  # of a batch of pictures
_POOL = pa.proxy_memory_pool(
    pa.default_memory_pool()
)  # for mapped files alone; only what is compressed takes from it


@contextlib.contextmanager
def reading(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Inside, what is wrong with a file is one line for the user; what is wrong with
    the cache stays an OSError.
    """
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException, *more) as error:
        if isinstance(error, InputError) or (
            getattr(error, "errno", None) in _LOST and path.exists()
        ):
            raise
        if not path.exists():
            raise InputError(f"{path}: no such file") from None
        hint = (
            "; a quote that is not closed takes in the rows after it"
            if '"' in str(error)
            else ""
        )
        raise InputError(
            f"{path} cannot be read as {path.suffix[1:].lower()}:"
            f" {one_line(error)}{hint}"
        ) from error


@dataclass
class _Opened(Generic[T]):
    """What one process has open of a source; another one, to which the source is
    pickled, begins anew.
    """

    files: OrderedDict[int, T] = field(default_factory=OrderedDict)
    failed: dict[int, tuple[float, Exception]] = field(
        default_factory=dict
    )  # until when, and why
    lock: threading.Lock = field(default_factory=threading.Lock)
    prefetching: int = 0  # the process whose threads prepare files
    requests: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)
    requested: list[int] = field(default_factory=list)

    def __reduce__(self) -> Any:
        return _Opened, ()


class FileSource(ABC, Generic[T]):
    """Rows in files.

    Every is prepared when its first row is read; ``streamed`` is whether that is
    costly.
    """

    max_open = 32  # of a streamed source

    def __init__(
        self, name: str, shard_sizes: Sequence[int], *, streamed: bool
    ) -> None:
        self.name, self.shard_sizes, self.streamed = name, tuple(shard_sizes), streamed
        self._ends = np.cumsum(self.shard_sizes)
        self._opened = _Opened[T]()

    @abstractmethod
    def prepare(self, shard: int) -> Path:
        """A local file of this shard that can be read in place."""

    @abstractmethod
    def load(self, shard: int, file: Path) -> T:
        """Opens a prepared file; raises FileNotFoundError where it is gone again."""

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shard_sizes[shard]

    def opened(self, shard: int) -> T:
        files, failed = self._opened.files, self._opened.failed
        with self._opened.lock:
            until, error = failed.get(shard, (0.0, None))
            if shard not in files and time.monotonic() <= until and error is not None:
                raise error
            attempts = 3
            while shard not in files:
                attempts -= 1
                try:
                    files[shard] = self.load(shard, self.prepare(shard))
                except (OSError, InputError) as error:
                    if (
                        isinstance(error, FileNotFoundError) and attempts
                    ):  # another process has made room in between
                        continue
                    failed[shard] = time.monotonic() + _FAILED_SECONDS, error
                    raise
                if self.streamed and len(files) > self.max_open:
                    files.popitem(last=False)
            files.move_to_end(shard)
            return files[shard]

    def prefetch(self, indices: np.ndarray) -> None:
        """Has the files of these rows prepared in the background; failures show when a
        row is read.
        """
        opened = self._opened
        if (
            opened.prefetching != os.getpid()
        ):  # threads do not survive a fork, and the queue may be locked
            opened.prefetching, opened.requests, opened.requested = (
                os.getpid(),
                queue.SimpleQueue(),
                [],
            )
            for _ in range(
                _DOWNLOADS
            ):  # daemons: the end of the program does not wait for them
                threading.Thread(
                    target=self._prepare_requested, name="cloob-prefetch", daemon=True
                ).start()
        for shard in np.unique(
            np.searchsorted(self._ends, indices, side="right")
        ).tolist():
            if shard not in opened.requested:
                opened.requests.put(shard)
                opened.requested = [*opened.requested[-63:], shard]

    def _prepare_requested(self) -> None:
        while True:
            with contextlib.suppress(InputError, OSError):
                self.prepare(self._opened.requests.get())


def check_name(path: Path, there: Sequence[str], column: str, kind: str) -> None:
    if (count := there.count(column)) != 1:
        what = f"{count} columns" if count else "no column"
        option = "--vectors" if kind == "vectors" else f"--{kind}-column"
        names = (
            f"its columns: {first_of([name[:60] for name in there])} ({option} names"
            " one)"
        )
        raise InputError(
            f"{path} has {what} {column!r}; {'rename all but one' if count else names}"
        )


class ArrowSource(FileSource[pa.Table]):
    """Rows of Arrow or Parquet files with a column of images (bytes, paths,
    ``datasets.Image``) and one of captions.

    Of a column of lists of captions every caption makes a pair with the row's image; an
    empty list makes one, a bad sample.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        image_column: str = _DEFAULTS[0],
        caption_column: str | None = _DEFAULTS[1],
        cache: Cache | None = None,
    ) -> None:
        self.paths, self._cache = tuple(paths), cache or Cache()
        self._is_parquet = [path.suffix.lower() == ".parquet" for path in paths]
        stored = [_schema_and_rows(path) for path in paths]
        self.schemas = [schema for schema, _ in stored]
        sizes = [rows for _, rows in stored]
        schemas = dict(zip(paths, self.schemas, strict=True))
        self.image = _column(schemas, image_column, "image")
        self._caption: str | None = None
        self._columns: list[str] | None = None
        self._pair_ends: list[np.ndarray] | None = None  # by row, of lists of captions
        if caption_column is not None:
            self._caption = _column(schemas, caption_column, "caption")
            # one can be both
            self._columns = list(dict.fromkeys((self.image, self._caption)))
            if is_list(self.schemas[0].field(self._caption).type):
                self._pair_ends = [self._count_pairs(i) for i in range(len(paths))]
                sizes = [int(ends.max(initial=0)) for ends in self._pair_ends]
        super().__init__(name, sizes, streamed=any(self._is_parquet))

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is ``file/row``, rows counted from 0 in every
        file.
        """
        key, caption = self.caption(index)
        return RawSample(key, self.picture(index), caption)

    def caption(self, index: int) -> tuple[str, str]:
        """Key and caption of a pair, whose picture is not opened."""
        path, table, row = self.row(index)
        cell = table.column(self._caption)[row]
        if self._pair_ends is not None:
            shard, pair = self.place(index)
            captions = cell.values if cell.is_valid and len(cell) else [pa.scalar(None)]
            cell = captions[pair - int(self._pair_ends[shard][row])]  # from the end
        key = f"{path.name}/{row}"
        return key, clean_caption(_bytes(cell), key, str(path))

    def pictures(self) -> np.ndarray | None:
        """(N,) per pair the first of its row; None where every row is one pair."""
        if self._pair_ends is None:
            return None
        firsts = [np.concatenate([[0], ends[:-1]]) for ends in self._pair_ends]
        counts = [np.diff(ends, prepend=0) for ends in self._pair_ends]
        starts = np.cumsum([0, *self.shard_sizes[:-1]])
        of_files = zip(starts, firsts, counts, strict=True)
        return np.concatenate(
            [start + np.repeat(first, count) for start, first, count in of_files]
        )

    def _count_pairs(self, shard: int) -> np.ndarray:
        """(rows,) the number of pairs up to and with every row of a file."""
        path = self.paths[shard]
        with reading(path):
            if self._is_parquet[shard]:
                table = parquet.read_table(path, columns=[self._caption])
            else:
                table = _map(path)
            lengths = pc.list_value_length(table.column(self._caption)).fill_null(0)
        return np.cumsum(np.maximum(lengths.to_numpy(), 1))

    def fingerprint(self) -> Fingerprint:
        files = [f"{path.name} {path.stat().st_size}" for path in self.paths]
        captions = [self._captions_digest(shard) for shard in range(len(self.paths))]
        return {"rows": len(self), "files": digest(files), "captions": digest(captions)}

    def _captions_digest(self, shard: int) -> str:
        if self._is_parquet[shard]:
            return repr(parquet.read_metadata(self.paths[shard]).to_dict())
        column = self.opened(shard).column(self._caption)
        if self._pair_ends is None:
            return of_column(column)
        flat = pa.chunked_array([chunk.flatten() for chunk in column.chunks])
        return digest([of_column(flat), self._pair_ends[shard]])

    def row(self, index: int) -> tuple[Path, pa.Table, int]:
        """The file that a pair is in, its content, and the number of its row in it."""
        shard, row = self.place(index)
        if self._pair_ends is not None:
            row = int(np.searchsorted(self._pair_ends[shard], row, side="right"))
        return self.paths[shard], self.opened(shard), row

    def picture(self, index: int) -> bytes:
        """The bytes of a row's picture: in the row, or in a file next to the table that
        the row names.
        """
        path, table, row = self.row(index)
        key, cell = f"{path.name}/{row}", table.column(self.image)[row]
        if isinstance(cell, pa.StructScalar):
            data, stored = (
                _bytes(cell[name]) if name in cell.type.names else None
                for name in ("bytes", "path")
            )
        else:
            data, stored = (
                (None, _bytes(cell)) if cell.type in _AS_BYTES else (_bytes(cell), None)
            )
        if data is None and stored:
            return read_pair_file(path.parent / os.fsdecode(stored), key, "image")
        if data is None or len(data) > MAX_IMAGE_BYTES:
            reason: Reason = "image too large" if data else "missing image"
            raise BadSample(
                reason, key, f"{len(data):,} bytes" if data else f"{path}: {NO_PICTURE}"
            )
        return data

    def prepare(self, shard: int) -> Path:
        path = self.paths[shard]
        with reading(path):
            stat = path.stat()

        def convert(
            target: Path,
        ) -> None:  # to a stream, whose dictionaries may differ from batch to batch
            with (
                reading(path),
                parquet.ParquetFile(path) as file,
                pa.OSFile(str(target), "wb") as sink,
            ):
                schema = file.schema_arrow
                schema = (
                    pa.schema(map(schema.field, self._columns))
                    if self._columns
                    else schema
                )
                with pa.ipc.new_stream(sink, schema) as writer:
                    for batch in file.iter_batches(_ROWS, columns=self._columns):
                        writer.write_batch(
                            batch.select(self._columns) if self._columns else batch
                        )

        name = (
            f"{path.resolve()} {(stat.st_size, stat.st_mtime_ns)} {self._columns}"
            f" {path.stem}.arrow"
        )
        return (
            self._cache.get("tables", name, convert)
            if self._is_parquet[shard]
            else path
        )

    def load(self, shard: int, file: Path) -> pa.Table:
        with reading(self.paths[shard]):
            table = _map(file)
            table = table.select(self._columns) if self._columns else table
            # its offsets lead into its data; a text that is not UTF-8 is a bad sample
            for column in table.columns:
                column.cast(_as_bytes(column.type)).validate(full=True)
            return table


def _schema_and_rows(path: Path) -> tuple[pa.Schema, int]:
    with reading(path):
        if path.suffix.lower() == ".parquet":
            stored = parquet.read_metadata(path)
            schema = stored.schema.to_arrow_schema()
        else:
            stored = _map(path)
            schema = stored.schema
        _ = schema.names  # UnicodeDecodeError
        return schema, stored.num_rows


def arrow_files(folder: Path) -> list[Path]:
    """The data files of a Hugging Face ``datasets`` folder, or of one of Arrow or
    Parquet files; [] if it is none.
    """
    state = folder / "state.json"
    if (folder / "dataset_dict.json").is_file():
        paths = []
        splits = {path.parent.name for path in folder.glob("*/state.json")}
    elif state.is_file() and (folder / "dataset_info.json").is_file():
        return _listed_files(state)
    else:
        paths = _files_in(folder) or _files_in(folder / "data")
        splits = {path.name.partition("-")[0] for path in paths if "-of-" in path.name}
    if len(splits) > 1 or (splits and not paths):
        raise InputError(
            f"{folder} holds the splits {', '.join(sorted(splits))}; name one, or its"
            " files"
        )
    return paths


def _files_in(folder: Path) -> list[Path]:
    files = (path for path in folder.glob("*") if path.suffix.lower() in ARROW_SUFFIXES)
    return sorted(files)


def _listed_files(state: Path) -> list[Path]:
    """The files that a saved dataset lists, which are in its folder."""
    paths = []
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        listed = json.loads(state.read_bytes())["_data_files"]
        paths = [state.parent / file["filename"] for file in listed]
    if {path.parent for path in paths} != {state.parent}:
        raise InputError(
            f"{state}: does not list files of its folder, as the package datasets"
            " writes it"
        )
    return paths


def holds_images(path: Path, image_column: str) -> bool:
    """Whether a Parquet file has its images inside, and not as paths."""
    try:
        schema = parquet.read_schema(path)
        kinds = {
            name: is_image(field.type)
            for name, field in zip(schema.names, schema, strict=True)
        }
    except (OSError, UnicodeDecodeError, pa.ArrowException):
        return False  # the reader of tables reports it
    return kinds.get(image_column, image_column == _DEFAULTS[0] and any(kinds.values()))


def _column(
    schemas: dict[Path, pa.Schema], column: str, kind: Literal["image", "caption"]
) -> str:
    """The column that was named, or without a name the only one of its kind in the
    first file.
    """
    first = next(iter(schemas.values()))
    is_one = is_image if kind == "image" else _is_text
    options = [field.name for field in first if is_one(field.type)]
    if kind == "caption" and not options:
        options = [field.name for field in first if is_list(field.type)]
    if column not in first.names and column in _DEFAULTS and len(options) == 1:
        column = str(options[0])
    expected = "images ({bytes, path}, bytes or paths)"
    if kind == "caption":
        expected = "text or lists of text"
    for path, schema in schemas.items():
        check_name(path, schema.names, column, kind)
        stored = schema.field(column).type
        fits = is_image(stored) if kind == "image" else is_list(stored)
        if not (fits or _is_text(stored) or pa.types.is_null(stored)):
            raise InputError(
                f"{path}: column {column!r} holds {stored}, not {expected}"
            )
    return column


def _is_text(kind: pa.DataType) -> bool:
    return kind in _AS_BYTES


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this kind holds encoded images: bytes, or {bytes, path}."""
    return kind in _BINARY or (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this kind holds lists of texts."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(lists and kind.value_type in _AS_BYTES)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The kind of the same column in which a text need not be UTF-8."""
    if not is_list(kind):
        return _AS_BYTES.get(kind, kind)
    make = pa.large_list if pa.types.is_large_list(kind) else pa.list_
    return make(_AS_BYTES[kind.value_type])


def _bytes(value: Any) -> bytes | None:
    return value.as_buffer().to_pybytes() if value.is_valid else None


def _map(path: Path) -> pa.Table:
    before = _POOL.bytes_allocated()
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(
            source, memory_pool=_POOL
        )
        batches = []
        for batch in (
            map(reader.get_batch, range(reader.num_record_batches))
            if is_file
            else reader
        ):
            batches.append(batch)
            if _POOL.bytes_allocated() > before:
                raise InputError(
                    f"{path}: is compressed; save it as Arrow without compression, or"
                    " as Parquet"
                )
    return pa.Table.from_batches(batches, reader.schema)
