"""Pairs in tables (CSV, TSV, JSON lines, Parquet, Arrow), each read as a table of
Arrow: with pictures inside, or in the files that it names.
"""

from __future__ import annotations

import contextlib
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
from cloob.errors import InputError, first_of

ARROW_SUFFIXES = (".arrow", ".parquet")

IMAGE_COLUMN = "filepath"  # where the user names none
CAPTION_COLUMN = "title"
_UNNAMED = (IMAGE_COLUMN, CAPTION_COLUMN)
_BINARY = (pa.binary(), pa.large_binary())
_STRINGS = (pa.string(), pa.large_string())
_TEXTS = (*_BINARY, *_STRINGS, pa.null())
_MAGIC = b"ARROW1"  # a file begins so; a stream has none
_ROWS = 64  # of a batch of pictures


class Opened(NamedTuple):
    """A file: of every row its picture's bytes or the path of one, of every pair its
    row and its caption.
    """

    images: pa.ChunkedArray  # of bytes that need not be UTF-8, as the others
    paths: pa.ChunkedArray
    rows: np.ndarray  # (pairs,)
    captions: pa.ChunkedArray


class TableSource(FileSource[Opened], Source):
    """Rows of tables with a column of images (bytes, paths, ``datasets.Image``) and one
    of captions, which are texts or lists of them.

    Every caption of a list makes a pair with the row's image; an empty list makes one,
    a bad sample. Parquet with its images inside becomes Arrow in the cache, which is
    mapped.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        image_column: str = IMAGE_COLUMN,
        caption_column: str = CAPTION_COLUMN,
    ) -> None:
        self.paths = tuple(paths)
        schemas = [_schema(path, [image_column, caption_column]) for path in paths]
        self._image = _column(schemas[0], image_column, is_image)
        # whether the pictures are in the table
        self.inside = _holds(schemas[0], self._image, is_image)
        if self.inside:
            caption_column = _column(schemas[0], caption_column, _is_text, _is_list)
        self._caption = caption_column
        # one can be both
        self._columns = list(dict.fromkeys((self._image, self._caption)))
        for path, schema in zip(paths, schemas, strict=True):
            self._check(path, schema)
        super().__init__(name, (), streamed=any(map(self._is_packed, self.paths)))
        self.resize(len(self._rows(shard)) for shard in range(len(paths)))

    def _check(self, path: Path, schema: pa.Schema) -> None:
        """Refuses a file without the two columns, or with other things in them."""
        check_name(path, schema.names, self._image, "image")
        check_name(path, schema.names, self._caption, "caption")
        images = "images ({bytes, path}, bytes or paths)"
        _check_type(path, schema.field(self._image), is_image, images)
        texts = "text or lists of text"
        _check_type(path, schema.field(self._caption), _is_list, texts)

    def _is_packed(self, path: Path) -> bool:
        return self.inside and is_parquet(path)

    def _rows(self, shard: int) -> np.ndarray:
        """The row of every pair of a file; nothing is unpacked for it."""
        path = self.paths[shard]
        if not self._is_packed(path):
            return self.opened(shard).rows
        with reading(path):
            if _is_list(parquet.read_schema(path).field(self._caption).type):
                table = parquet.read_table(path, columns=[self._caption])
                return _pairs(table[0])[0]
            return np.arange(parquet.read_metadata(path).num_rows)

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is the path of its image, or of one in the
        table ``file/row``, counted from 0. A ``BadSample`` counts rows from 1.
        """
        key, caption = self.caption(index)
        return RawSample(key, self._picture(index), caption)

    def caption(self, index: int) -> tuple[str, str]:
        """Key and caption of a pair, whose picture is not opened."""
        shard, pair = self.place(index)
        key, where, _ = self._names(index)
        stored = self.opened(shard).captions[pair].as_py()
        return key, clean_caption(stored, key, where)

    def _picture(self, index: int) -> bytes:
        """The bytes of a pair's picture: in its row, or in a file next to the table
        that the row names.
        """
        shard, pair = self.place(index)
        key, where, path = self._names(index)
        opened = self.opened(shard)
        data: bytes | None = opened.images[int(opened.rows[pair])].as_py()
        if data is None and path:
            folder = self.paths[shard].parent
            return read_pair_file(folder / path, key, "image", where)
        if data is None:
            raise BadSample("missing image", key, f"{where}: neither bytes nor a path")
        if len(data) > MOST_BYTES["image"]:
            raise BadSample("image too large", key, f"{where}: {len(data):,} bytes")
        return data

    def _names(self, index: int) -> tuple[str, str, str]:
        """The key of a pair, the place of its row in words, and its picture's path."""
        shard, pair = self.place(index)
        opened = self.opened(shard)
        name = self.paths[shard].name
        row = int(opened.rows[pair])
        where = f"row {row + 1:,} of {name}"
        path = as_text(opened.paths[row].as_py()).strip()
        return f"{name}/{row}" if self.inside else as_utf8(path) or where, where, path

    def pictures(self) -> np.ndarray | None:
        """(N,) int64: per pair the first of its row, or of its path where that has
        several captions; None where no two have the same.
        """
        shards = range(len(self.paths))
        if self.inside:
            # a row has as many captions as pairs follow it
            rows = [self._rows(shard) + self.starts[shard] for shard in shards]
            pictures = np.concatenate(rows)
        else:
            files = list(map(self.opened, shards))
            paths = _codes([file.paths.take(file.rows) for file in files])
            captions = _codes([file.captions for file in files])
            pictures = _with_several(paths, captions)
        first = first_equal(pictures)
        return None if len(np.unique(first)) == len(first) else first

    def fingerprint(self) -> Fingerprint:
        images: list[str] = []
        captions: list[str | np.ndarray] = []
        for shard, path in enumerate(self.paths):
            if self.inside:
                images.append(f"{path.name} {path.stat().st_size}")
            else:
                images.append(of_column(self.opened(shard).paths))
            if self._is_packed(path):  # its metadata, which are read fast
                captions.append(repr(parquet.read_metadata(path).to_dict()))
            else:
                opened = self.opened(shard)
                captions += [of_column(opened.captions), opened.rows]
        found = {"images": digest(images), "captions": digest(captions)}
        return {"rows": len(self), **found}

    def prepare(self, shard: int) -> Path:
        """The file to read: of Parquet with pictures its unpacked copy in the cache."""
        path = self.paths[shard]
        if not self._is_packed(path):
            return path
        with reading(path):
            stat = path.stat()
        version = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {self._columns}"
        unpack = partial(self._unpack, path)
        return Cache().get("tables", f"{version} {path.stem}.arrow", unpack)

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
            if self._is_packed(path) or path.suffix.lower() == ".arrow":
                table = _map(file)
            else:
                table = read_table(path, self._columns)
            images = table[self._image]
            nothing = pa.chunked_array([pa.nulls(len(table), pa.large_binary())])
            paths = nothing
            if not self.inside:
                images, paths = nothing, _as_bytes(images)
            elif pa.types.is_struct(images.type):
                images.validate()
                if images.type.get_field_index("path") >= 0:
                    paths = _as_bytes(pc.struct_field(images, "path"))
                images = _as_bytes(pc.struct_field(images, "bytes"))
            else:
                images = _as_bytes(images)
            return Opened(images, paths, *_pairs(table[self._caption]))


def check_name(path: Path, names: Sequence[str], column: str, kind: str) -> None:
    """Refuses a column that a table does not have, or has twice."""
    count = names.count(column)
    if count > 1:
        raise InputError(f"{path} has {count} columns {column!r}; rename all but one")
    if not count:
        columns = first_of([name[:60] for name in names])
        raise InputError(
            f"{path} has no column {column!r}; its columns: {columns} (--{kind}-column"
            " names one)"
        )


def _check_type(
    path: Path, field: pa.Field, fits: Callable[[pa.DataType], bool], expected: str
) -> None:
    if not (fits(field.type) or field.type in _TEXTS):
        raise InputError(
            f"{path}: column {field.name!r} holds {field.type}, not {expected}"
        )


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same texts or bytes, which need not be UTF-8; checked, as offsets in a
    stranger's file may lead out of it.
    """
    column.validate()
    column = column.cast(pa.large_binary())
    column.validate(full=True)
    return column


def _pairs(captions: pa.ChunkedArray) -> tuple[np.ndarray, pa.ChunkedArray]:
    """The row of every pair, and its caption; an empty list is a row without one."""
    if not _is_list(captions.type):
        return np.arange(len(captions)), _as_bytes(captions)
    captions.validate()
    captions = captions.cast(pa.large_list(pa.large_binary()))
    captions.validate(full=True)
    lengths = pc.list_value_length(captions).fill_null(0).to_numpy()
    counts = np.maximum(lengths, 1)
    is_text = np.repeat(lengths > 0, counts)
    places = pa.array(np.cumsum(is_text) - 1, mask=~is_text)
    texts = pc.list_flatten(captions).take(places)
    return np.repeat(np.arange(len(captions)), counts), texts


def _with_several(paths: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """The codes of paths, all different where a path has one caption alone: a row that
    is repeated counts as often.
    """
    n = len(paths)
    numbers = np.maximum(captions, -1) + 1  # 0 of empty ones
    # A path once for each of its captions; n + 1 is above every number.
    distinct = np.unique(paths * (n + 1) + numbers) // (n + 1)
    several = distinct[1:][distinct[1:] == distinct[:-1]]
    is_several = np.isin(paths, several[several >= 0])
    return np.where(is_several, paths, -1 - np.arange(n))


def _codes(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """(N,) int64 numbers, equal for equal cells; below zero and all different for
    empty ones.
    """
    column = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    column = pc.if_else(pc.not_equal(column, b""), column, None)
    encoded = column.dictionary_encode().combine_chunks()
    codes = np.asarray(encoded.indices.fill_null(-1).to_numpy(), np.int64)
    return np.where(codes < 0, -1 - np.arange(len(codes)), codes)


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
        return _holds(schema, _column(schema, image_column, is_image), is_image)
    except (OSError, UnicodeDecodeError, pa.ArrowException):
        return False  # the reader of tables reports it


def _column(
    schema: pa.Schema, column: str, *kinds: Callable[[pa.DataType], bool]
) -> str:
    """The column that was named, or without a name the only one of a kind."""
    for fits in kinds:
        fitting = [field.name for field in schema if fits(field.type)]
        is_named = column in schema.names or column not in _UNNAMED
        if not is_named and len(fitting) == 1:
            return str(fitting[0])
    return column


def _holds(schema: pa.Schema, column: str, fits: Callable[[pa.DataType], bool]) -> bool:
    return schema.names.count(column) == 1 and fits(schema.field(column).type)


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this kind holds encoded images: bytes, or {bytes, path}."""
    return kind in _BINARY or (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    )


def _is_text(kind: pa.DataType) -> bool:
    return kind in _STRINGS


def _is_list(kind: pa.DataType) -> bool:
    """Whether a column of this kind holds lists of texts."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(lists and kind.value_type in _TEXTS)


def _map(path: Path) -> pa.Table:
    """A file or a stream of Arrow, mapped; what is compressed takes its size in
    memory.
    """
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
        return reader(source).read_all()
