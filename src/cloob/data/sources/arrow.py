"""Pairs in tables (CSV, TSV, JSON lines, Parquet, Arrow), each read as a table of
Arrow: with pictures inside, or in the files that it names.
"""

from __future__ import annotations

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
from cloob.data.sources.files import reading
from cloob.data.sources.tables import (
    TABLE_SUFFIXES,
    as_text,
    check_name,
    column_names,
    is_parquet,
    read_table,
)
from cloob.errors import InputError

SUFFIXES = (*TABLE_SUFFIXES, ".arrow")

IMAGE_COLUMN = "filepath"  # where the user names none
CAPTION_COLUMN = "title"
_BINARY = (pa.binary(), pa.large_binary())
_STRINGS = (pa.string(), pa.large_string())
_TEXTS = (*_BINARY, *_STRINGS, pa.null())
_LISTS = pa.large_list(pa.large_binary())
_MAGIC = b"ARROW1"  # a file begins so; a stream has none
_ROWS = 64  # of a batch of pictures


class _Place(NamedTuple):
    """Where a pair lies."""

    row: int  # of all tables together
    path: str  # of its picture, or empty
    key: str
    where: str  # in words
    folder: Path  # of its table


class TableSource(Source):
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
        self._arguments = name, tuple(paths), image_column, caption_column
        self.name = name
        self._tables = tuple(paths)
        schema = _schema(paths[0], [image_column, caption_column])
        image_column = _found_column(schema, image_column, IMAGE_COLUMN, _is_image)
        caption_column = _found_column(schema, caption_column, CAPTION_COLUMN, _is_text)
        # whether the pictures are in the tables
        self.inside = any(
            field.name == image_column and _is_image(field.type) for field in schema
        )
        if self.inside:
            _check_room(name, paths)
        tables = [_read(path, image_column, caption_column) for path in paths]
        self._first_rows = np.cumsum([0, *map(len, tables)])
        columns = pa.concat_tables(tables)
        # by row; one of them may be null
        self._images = columns["image"]
        self._image_paths = columns["path"]
        # of each of which a pair is made, and (pairs,) its row
        self._captions, self._rows = _pairs(columns["captions"])
        starts = np.searchsorted(self._rows, self._first_rows)
        self.shard_sizes = tuple(np.diff(starts).tolist())

    def __reduce__(self) -> tuple[object, ...]:  # a spawned worker opens the files
        return TableSource, self._arguments

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is the path of its image, or of one in the
        table ``file/row``, counted from 0. A ``BadSample`` counts rows from 1.
        """
        place = self._place(index)
        caption = self._caption(index, place)
        return RawSample(place.key, self._image(place), caption)

    def caption(self, index: int) -> tuple[str, str]:
        """Key and caption of a pair, whose picture is not opened."""
        place = self._place(index)
        return place.key, self._caption(index, place)

    def _place(self, index: int) -> _Place:
        row = int(self._rows[index])
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        table = self._tables[number]
        row_of_table = row - int(self._first_rows[number])
        path = as_text(self._image_paths[row].as_py()).strip()
        where = f"row {row_of_table + 1:,} of {table.name}"
        key = as_utf8(path) or where
        if self.inside:
            key = f"{table.name}/{row_of_table}"
        return _Place(row, path, key, where, table.parent)

    def _caption(self, index: int, place: _Place) -> str:
        return clean_caption(self._captions[index].as_py(), place.key, place.where)

    def _image(self, place: _Place) -> bytes:
        """The picture's file: in its row, or next to the table."""
        key, where = place.key, place.where
        data: bytes | None = self._images[place.row].as_py()
        if data is None and place.path:
            return read_pair_file(place.folder / place.path, key, "image", where)
        if data is None:
            raise BadSample("missing image", key, f"{where}: neither bytes nor a path")
        if len(data) > MOST_BYTES["image"]:
            raise BadSample("image too large", key, f"{where}: {len(data):,} bytes")
        return data

    def pictures(self) -> np.ndarray | None:
        """(N,) int64: per pair the first of its row, or of its path where that has
        several captions; None where no two have the same.
        """
        pictures = self._rows
        if not self.inside:
            paths = self._image_paths.take(pictures)
            pictures = _with_several(paths, self._captions)
        first = first_equal(pictures)
        return None if len(np.unique(first)) == len(first) else first

    def fingerprint(self) -> Fingerprint:
        images = [of_column(self._image_paths)]
        if self.inside:
            images = [f"{path.name} {path.stat().st_size}" for path in self._tables]
        return {
            "rows": len(self),
            "images": digest(images),
            "captions": digest([of_column(self._captions), self._rows]),
        }


def _with_several(paths: pa.ChunkedArray, captions: pa.ChunkedArray) -> np.ndarray:
    """Numbers of pairs, equal for equal paths with several captions: a row that is
    repeated counts as often.
    """
    pairs = pa.table({"path": paths, "caption": captions})
    counts = pairs.group_by("path").aggregate(
        [("caption", "count_distinct", pc.CountOptions(mode="all"))]
    )
    several = counts.filter(pc.greater(counts["caption_count_distinct"], 1))["path"]
    several = several.filter(pc.not_equal(several, b"")).combine_chunks()
    numbers = pc.index_in(paths, several).fill_null(-1).to_numpy()
    return np.where(numbers < 0, -1 - np.arange(len(numbers)), numbers)


def _read(path: Path, image_column: str, caption_column: str) -> pa.Table:
    """A file's rows as bytes, which need not be UTF-8: of pictures or their paths, and
    lists of captions.
    """
    schema = _schema(path, [image_column, caption_column])
    check_name(path, schema.names, image_column, "image")
    check_name(path, schema.names, caption_column, "caption")
    image = schema.field(image_column).type
    inside = _is_image(image)  # of a text table paths are read as bytes, too
    caption = schema.field(caption_column).type
    if not (inside or image in _TEXTS):
        expected = "images ({bytes, path}, bytes or paths)"
        raise _wrong_type(path, image_column, image, expected)
    if not (_is_list(caption) or caption in _TEXTS):
        raise _wrong_type(path, caption_column, caption, "text or lists of text")
    # one can be both
    columns = list(dict.fromkeys((image_column, caption_column)))
    with reading(path):
        if inside and is_parquet(path):
            table = _map(_unpacked(path, columns))
        elif path.suffix.lower() == ".arrow":
            table = _map(path)
        else:
            table = read_table(path, columns)
        images, paths = _images(table[image_column], inside)
        captions = _as_lists(table[caption_column])
    return pa.table({"image": images, "path": paths, "captions": captions})


def _schema(path: Path, required: Sequence[str]) -> pa.Schema:
    """The columns of a file; those of text tables and JSON are texts."""
    with reading(path):
        if is_parquet(path):
            schema = parquet.read_schema(path)
        elif path.suffix.lower() == ".arrow":
            schema = _map(path).schema
        else:
            names = column_names(path, required)
            schema = pa.schema([(name, pa.string()) for name in names])
        _ = schema.names  # UnicodeDecodeError
        return schema


def _found_column(
    schema: pa.Schema, column: str, usual: str, fits: Callable[[pa.DataType], bool]
) -> str:
    """The column of a name; where nobody named one, the only one of a kind."""
    fitting: list[str] = [field.name for field in schema if fits(field.type)]
    is_named = column in schema.names or column != usual
    return column if is_named or len(fitting) != 1 else fitting[0]


def _wrong_type(
    path: Path, column: str, kind: pa.DataType, expected: str
) -> InputError:
    return InputError(f"{path}: column {column!r} holds {kind}, not {expected}")


def _is_image(kind: pa.DataType) -> bool:
    """Whether a column of this kind holds encoded images: bytes, or {bytes, path}."""
    return kind in _BINARY or (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    )


def _is_text(kind: pa.DataType) -> bool:
    return kind in _STRINGS or _is_list(kind)


def _is_list(kind: pa.DataType) -> bool:
    """Whether a column of this kind holds lists of texts."""
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(lists and kind.value_type in _TEXTS)


def _check_room(name: str, paths: Sequence[Path]) -> None:
    """Refuses Parquet of more pictures than the cache would keep unpacked."""
    needed = sum(path.stat().st_size for path in paths if is_parquet(path))
    if needed > Cache().room:
        raise InputError(
            f"{name}: Parquet is unpacked, and takes some {needed:,} bytes; set"
            " CLOOB_CACHE_BYTES to more, or store Arrow or tars"
        )


def _map(path: Path) -> pa.Table:
    """A file or a stream of Arrow, mapped; what is compressed takes its size in
    memory.
    """
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
        return reader(source).read_all()


def _unpacked(path: Path, columns: Sequence[str]) -> Path:
    """Parquet as Arrow in the cache, which can be mapped."""
    stat = path.stat()
    version = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {columns}"
    unpack = partial(_unpack, path, columns)
    return Cache().get("tables", f"{version} {path.stem}.arrow", unpack)


def _unpack(path: Path, columns: Sequence[str], target: Path) -> None:
    """Writes a stream, whose dictionaries may differ from batch to batch."""
    with reading(path), parquet.ParquetFile(path) as file:
        schema = pa.schema(map(file.schema_arrow.field, columns))
        with pa.ipc.new_stream(str(target), schema) as writer:
            for batch in file.iter_batches(_ROWS, columns=columns):
                writer.write_batch(batch.select(columns))


def _images(
    column: pa.ChunkedArray, inside: bool
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The bytes of pictures and their paths, by row; one of them may be null."""
    nothing = pa.chunked_array([pa.nulls(len(column), pa.large_binary())])
    if not inside:
        return nothing, _as_bytes(column)
    if not pa.types.is_struct(column.type):
        return _as_bytes(column), nothing
    column.validate()
    images = _as_bytes(pc.struct_field(column, "bytes"))
    if column.type.get_field_index("path") < 0:
        return images, nothing
    return images, _as_bytes(pc.struct_field(column, "path"))


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same texts or bytes, which need not be UTF-8; checked, as offsets in a
    stranger's file may lead out of it.
    """
    column.validate()
    column = column.cast(pa.large_binary())
    column.validate(full=True)
    return column


def _as_lists(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of captions; a text becomes one of itself, without a copy."""
    if _is_list(captions.type):
        captions.validate()
        captions = captions.cast(_LISTS)
        captions.validate(full=True)
        return captions
    chunks = _as_bytes(captions).chunks
    lists = [
        pa.LargeListArray.from_arrays(np.arange(len(chunk) + 1), chunk)
        for chunk in chunks
    ]
    return pa.chunked_array(lists, _LISTS)


def _pairs(captions: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The caption of every pair, and its row; an empty list is a row without one."""
    is_empty = pc.equal(pc.list_value_length(captions).fill_null(0), 0)
    if pc.any(is_empty).as_py():
        captions = pc.if_else(is_empty, pa.scalar([None], _LISTS), captions)
    return pc.list_flatten(captions), pc.list_parent_indices(captions).to_numpy()


def arrow_files(folder: Path) -> list[Path]:
    """The data files of a Hugging Face ``datasets`` folder, or of one of Arrow or
    Parquet files; [] if it is none.
    """
    state = folder / "state.json"
    if state.is_file() and (folder / "dataset_info.json").is_file():
        return _listed_files(state)
    splits = {path.parent.name for path in folder.glob("*/state.json")}
    if splits:
        raise _several_splits(folder, splits)
    paths = _files_in(folder) or _files_in(folder / "data")
    splits = {path.name.partition("-")[0] for path in paths if "-of-" in path.name}
    if len(splits) > 1:
        raise _several_splits(folder, splits)
    return paths


def _several_splits(folder: Path, names: set[str]) -> InputError:
    return InputError(
        f"{folder} holds the splits {', '.join(sorted(names))}; name one, or its files"
    )


def _files_in(folder: Path) -> list[Path]:
    """The files of data; ``cache-….arrow`` is what ``datasets`` has computed of
    them.
    """
    paths = [*folder.glob("*.arrow"), *folder.glob("*.parquet")]
    return sorted(path for path in paths if not path.name.startswith("cache-"))


def _listed_files(state: Path) -> list[Path]:
    """The files that a saved dataset lists, which are in its folder; others may be left
    of a set that was there before.
    """
    try:
        listed = json.loads(state.read_bytes())["_data_files"]
        return [state.with_name(file["filename"]) for file in listed]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{state}: does not list files of its folder, as the package datasets"
            " writes it"
        ) from None
