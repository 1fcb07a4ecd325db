"""Pairs in tables (CSV, TSV, JSON lines, Parquet, Arrow), each read as a table of
Arrow: with pictures inside, or in the files that it names.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cloob.cache import Cache
from cloob.data.batch import (
    MOST_BYTES,
    BadSample,
    RawSample,
    as_utf8,
    clean_caption,
    read_pair_file,
)
from cloob.data.source import Fingerprint, Source, digest, first_equal, of_column
from cloob.data.sources.files import FileSource, reading
from cloob.data.sources.tables import as_text, column_names, is_parquet, read_table
from cloob.errors import InputError, counted, first_of

ARROW_SUFFIXES = (".arrow", ".parquet")
NO_PICTURE = "neither bytes nor a path"  # of a row without a picture

IMAGE_COLUMN = "filepath"  # where the user names none
CAPTION_COLUMN = "title"
_BINARY = (pa.binary(), pa.large_binary())
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
_TEXTS = (*_BINARY, *_AS_BYTES, pa.null())
_MAGIC = b"ARROW1"  # a file begins so; a stream has none
_ROWS = 64  # of a batch of pictures


def check_name(path: Path, names: Sequence[str], column: str, kind: str) -> None:
    """Refuses a column that a table does not have, or has twice."""
    count = names.count(column)
    if count > 1:
        raise InputError(f"{path} has {count} columns {column!r}; rename all but one")
    if not count:
        option = "--vectors" if kind == "vectors" else f"--{kind}-column"
        columns = first_of([name[:60] for name in names])
        raise InputError(
            f"{path} has no column {column!r}; its columns: {columns} ({option} names"
            " one)"
        )


class Opened(NamedTuple):
    """A file as a table; every caption of a list is a pair with its row."""

    table: pa.Table
    captions: pa.ChunkedArray  # (pairs,)
    rows: np.ndarray | range  # (pairs,) of the table


class TableSource(FileSource[Opened], Source):
    """Rows of tables with a column of images (bytes, paths, ``datasets.Image``) and one
    of captions, which are texts or lists of them.

    Every caption of a list makes a pair with the row's image; an empty list makes one,
    a bad sample. Parquet with its images inside becomes Arrow in the cache, which is
    mapped. Without a column of captions every row has its picture, and all columns are
    read.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        image_column: str = IMAGE_COLUMN,
        caption_column: str | None = CAPTION_COLUMN,
    ) -> None:
        self.paths = tuple(paths)
        required = [column for column in (image_column, caption_column) if column]
        schemas = [_schema(path, required) for path in paths]
        self.schema = schemas[0]
        self.image = _image_column(self.schema, image_column)
        self._check_name(schemas, self.image, "image")
        # whether the pictures are in the table
        self.inside = is_image(self.schema.field(self.image).type)
        self._caption = caption_column
        self._columns = self.schema.names
        if caption_column is not None:
            if self.inside:
                caption_column = _caption_column(self.schema, caption_column)
            self._check_name(schemas, caption_column, "caption")
            self._caption = caption_column
            # one can be both
            self._columns = list(dict.fromkeys((self.image, caption_column)))
        self.stray: dict[tuple[int, int], int] = {}  # lines in a file's row
        packed = self.inside and any(map(is_parquet, paths))
        super().__init__(name, (), streamed=packed)
        self._rows = [
            self._rows_of(shard, schemas[shard]) for shard in range(len(paths))
        ]
        self.resize(map(len, self._rows))
        if self.stray:
            rows = counted(len(self.stray), "rows")
            lines = counted(sum(self.stray.values()), "lines")
            _, first = min(self.stray)
            self.remark = (
                f"stray quotes in {rows}, first in row {first + 1:,}, take in {lines}:"
                " close or double each"
            )

    def _check_name(self, schemas: Sequence[pa.Schema], column: str, kind: str) -> None:
        """Refuses files without a column of this name."""
        for path, schema in zip(self.paths, schemas, strict=True):
            check_name(path, schema.names, column, kind)

    def _is_packed(self, shard: int) -> bool:
        return self.inside and is_parquet(self.paths[shard])

    def _rows_of(self, shard: int, schema: pa.Schema) -> np.ndarray | range:
        """The row of every pair of a file; nothing is unpacked for it."""
        if not self._is_packed(shard):
            return self.opened(shard).rows
        path = self.paths[shard]
        self._check_types(path, schema)
        with reading(path):
            if self._caption and is_list(schema.field(self._caption).type):
                table = parquet.read_table(path, columns=[self._caption])
                return _pairs(table[0])[1]
            return range(parquet.read_metadata(path).num_rows)

    def _check_types(self, path: Path, schema: pa.Schema) -> None:
        """Refuses a file with other things in its columns."""
        images = "images ({bytes, path}, bytes or paths)"
        _check_type(path, schema.field(self.image), is_image, images)
        if self._caption is not None:
            texts = "text or lists of text"
            _check_type(path, schema.field(self._caption), is_list, texts)

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is the path of its image, or of one in the
        table ``file/row``, counted from 0. A ``BadSample`` counts rows from 1.
        """
        key, caption = self.caption(index)
        return RawSample(key, self.picture(index), caption)

    def caption(self, index: int) -> tuple[str, str]:
        """Key and caption of a pair, whose picture is not opened."""
        shard, pair = self.place(index)
        key, where = self._names(index)
        lines = self.stray.get((shard, pair))
        if lines is not None:
            taken = f"a field takes in {counted(lines, 'lines')} that look like rows"
            raise BadSample("stray quote", where, f"{where}: {taken}")
        stored = _bytes(self.opened(shard).captions[pair])
        return key, clean_caption(stored, key, where)

    def picture(self, index: int) -> bytes:
        """The bytes of a row's picture: in the row, or in a file next to the table that
        the row names.
        """
        key, where = self._names(index)
        data, path = self.image_of(index)
        if data is None and path:
            folder = self.paths[self.place(index)[0]].parent
            return read_pair_file(folder / path, key, "image", where)
        if data is None:
            raise BadSample("missing image", key, f"{where}: {NO_PICTURE}")
        if len(data) > MOST_BYTES["image"]:
            raise BadSample("image too large", key, f"{where}: {len(data):,} bytes")
        return data

    def _names(self, index: int) -> tuple[str, str]:
        """The key of a pair, and the place of its row in words."""
        path, _, row = self.row(index)
        where = f"row {row + 1:,} of {path.name}"
        if self.inside:
            return f"{path.name}/{row}", where
        return as_utf8(self.image_of(index)[1]) or where, where

    def row(self, index: int) -> tuple[Path, pa.Table, int]:
        """The file that a pair is in, its content, and the number of its row in it."""
        shard, pair = self.place(index)
        opened = self.opened(shard)
        return self.paths[shard], opened.table, int(opened.rows[pair])

    def image_of(self, index: int) -> tuple[bytes | None, str]:
        """The bytes of a pair's picture, and the path of its file, as its row has
        them.
        """
        _, table, row = self.row(index)
        cell = table[self.image][row]
        if isinstance(cell, pa.StructScalar):
            path = _bytes(cell["path"]) if "path" in cell.type.names else None
            return _bytes(cell["bytes"]), as_text(path).strip()
        stored = _bytes(cell)
        return (stored, "") if self.inside else (None, as_text(stored).strip())

    def pictures(self) -> np.ndarray | None:
        """(N,) int64: per pair the first of its row, or of its path where that has
        several captions; None where no two have the same.
        """
        if not self.inside:
            return self._repeated_paths()
        if all(isinstance(rows, range) for rows in self._rows):
            return None
        files = zip(self._rows, self.starts, strict=True)
        rows = [start + np.asarray(of_file) for of_file, start in files]
        return first_equal(np.concatenate(rows))

    def _repeated_paths(self) -> np.ndarray | None:
        files = [self.opened(shard) for shard in range(len(self.paths))]
        path = _codes(
            [file.table[self.image].take(_array(file.rows)) for file in files]
        )
        caption = _codes([file.captions for file in files])
        n = len(path)
        # a path once for each of its captions; n + 1 is above every code
        distinct = np.unique(path * (n + 1) + caption) // (n + 1)
        several = distinct[1:][distinct[1:] == distinct[:-1]]
        is_several = np.isin(path, several[several >= 0])
        if not is_several.any():
            return None
        return first_equal(np.where(is_several, path, -1 - np.arange(n)))

    def fingerprint(self) -> Fingerprint:
        images: list[str] = []
        captions: list[str | np.ndarray] = []
        for shard, path in enumerate(self.paths):
            if self._is_packed(shard):  # its metadata, which are read fast
                captions.append(repr(parquet.read_metadata(path).to_dict()))
            else:
                opened = self.opened(shard)
                captions += [of_column(opened.captions), _array(opened.rows)]
            if self.inside:
                images.append(f"{path.name} {path.stat().st_size}")
            else:
                images.append(of_column(self.opened(shard).table[self.image]))
        found = {"images": digest(images), "captions": digest(captions)}
        return {"rows": len(self), **found}

    def prepare(self, shard: int) -> Path:
        """The file to read: of Parquet with pictures its unpacked copy in the cache."""
        path = self.paths[shard]
        if not self._is_packed(shard):
            return path
        with reading(path):
            stat = path.stat()
        version = stat.st_size, stat.st_mtime_ns
        name = f"{path.resolve()} {version} {self._columns} {path.stem}.arrow"
        return Cache().get("tables", name, partial(self._unpack, path))

    def _unpack(self, path: Path, target: Path) -> None:
        """Writes a stream, whose dictionaries may differ from batch to batch."""
        with reading(path), parquet.ParquetFile(path) as file:
            schema = pa.schema(map(file.schema_arrow.field, self._columns))
            with pa.ipc.new_stream(str(target), schema) as writer:
                for batch in file.iter_batches(_ROWS, columns=self._columns):
                    writer.write_batch(batch.select(self._columns))

    def load(self, shard: int, file: Path) -> Opened:
        """Maps or reads a file, and checks its columns."""
        path = self.paths[shard]
        with reading(path):
            if self._is_packed(shard) or path.suffix.lower() == ".arrow":
                table = _map(file).select(self._columns)
                # its offsets lead into its data; a text that is not UTF-8 is a bad
                # sample
                for column in table.columns:
                    column.cast(_as_bytes(column.type)).validate(full=True)
            else:
                table, stray = read_table(path, self._columns)
                self.stray |= {(shard, row): lines for row, lines in stray.items()}
        self._check_types(path, table.schema)
        if self._caption is None:
            return Opened(table, table[self.image], range(len(table)))
        return Opened(table, *_pairs(table[self._caption]))


def _check_type(
    path: Path, field: pa.Field, fits: Callable[[pa.DataType], bool], expected: str
) -> None:
    if not (fits(field.type) or field.type in _TEXTS):
        raise InputError(
            f"{path}: column {field.name!r} holds {field.type}, not {expected}"
        )


def _pairs(captions: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray | range]:
    """The caption of every pair, and its row; an empty list is a row without one."""
    if not is_list(captions.type):
        return captions, range(len(captions))
    lengths = pc.list_value_length(captions).fill_null(0).to_numpy()
    counts = np.maximum(lengths, 1)
    is_text = np.repeat(lengths > 0, counts)
    places = pa.array(np.cumsum(is_text) - 1, mask=~is_text)
    texts = pc.list_flatten(captions).take(places)
    return texts, np.repeat(np.arange(len(captions)), counts)


def _array(rows: np.ndarray | range) -> np.ndarray:
    return np.arange(len(rows)) if isinstance(rows, range) else rows


def _codes(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """(N,) int64 numbers, equal for equal cells; -1 for an empty one."""
    as_bytes = [column.cast(pa.large_binary()) for column in columns]
    chunks = itertools.chain(*(column.chunks for column in as_bytes))
    column = pa.chunked_array(chunks, pa.large_binary())
    column = pc.if_else(pc.not_equal(column, b""), column, None)
    codes = column.dictionary_encode().combine_chunks().indices
    return np.asarray(codes.fill_null(-1).to_numpy(), np.int64)


def _schema(path: Path, required: Sequence[str]) -> pa.Schema:
    """The columns of a file; those of text tables and JSON are texts."""
    with reading(path):
        if is_parquet(path):
            schema = parquet.read_schema(path)
        elif path.suffix.lower() == ".arrow":
            schema = _map(path).schema
        else:
            names = column_names(path, required)
            return pa.schema([(name, pa.string()) for name in names])
        _ = schema.names  # UnicodeDecodeError
        return schema


def arrow_files(folder: Path) -> list[Path]:
    """The data files of a Hugging Face ``datasets`` folder, or of one of Arrow or
    Parquet files; [] if it is none.
    """
    state = folder / "state.json"
    if state.is_file() and (folder / "dataset_info.json").is_file():
        return _listed_files(state)
    if (folder / "dataset_dict.json").is_file():
        raise _splits(
            folder, {path.parent.name for path in folder.glob("*/state.json")}
        )
    paths = _files_in(folder) or _files_in(folder / "data")
    splits = {path.name.partition("-")[0] for path in paths if "-of-" in path.name}
    if len(splits) > 1:
        raise _splits(folder, splits)
    return paths


def _splits(folder: Path, names: set[str]) -> InputError:
    return InputError(
        f"{folder} holds the splits {', '.join(sorted(names))}; name one, or its files"
    )


def _files_in(folder: Path) -> list[Path]:
    """The files of data; ``cache-….arrow`` is what ``datasets`` has computed of
    them.
    """
    paths = (path for path in folder.glob("*") if path.suffix.lower() in ARROW_SUFFIXES)
    return sorted(path for path in paths if not path.name.startswith("cache-"))


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
        kinds = {field.name: is_image(field.type) for field in schema}
    except (OSError, UnicodeDecodeError, pa.ArrowException):
        return False  # the reader of tables reports it
    if image_column in kinds:
        return kinds[image_column]
    return image_column == IMAGE_COLUMN and any(kinds.values())


def _image_column(schema: pa.Schema, column: str) -> str:
    """The column that was named, or without a name the only one of images."""
    images = [field.name for field in schema if is_image(field.type)]
    is_named = column in schema.names or column != IMAGE_COLUMN
    return column if is_named or len(images) != 1 else str(images[0])


def _caption_column(schema: pa.Schema, column: str) -> str:
    """The column that was named, or without a name the only one of texts, or else of
    lists of texts.
    """
    texts = [field.name for field in schema if _is_text(field.type)]
    texts = texts or [field.name for field in schema if is_list(field.type)]
    is_named = column in schema.names or column not in (IMAGE_COLUMN, CAPTION_COLUMN)
    return column if is_named or len(texts) != 1 else str(texts[0])


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
    return bool(lists and kind.value_type in _TEXTS)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The kind of the same column in which a text need not be UTF-8."""
    if not is_list(kind):
        return _AS_BYTES.get(kind, kind)
    make = pa.large_list if pa.types.is_large_list(kind) else pa.list_
    return make(_AS_BYTES.get(kind.value_type, kind.value_type))


def _bytes(value: pa.Scalar) -> bytes | None:
    return value.as_buffer().to_pybytes() if value.is_valid else None


def _map(path: Path) -> pa.Table:
    """A file or a stream of Arrow, mapped; what is compressed takes its size in
    memory.
    """
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
        return reader(source).read_all()
