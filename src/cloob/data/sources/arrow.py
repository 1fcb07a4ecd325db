"""Pairs in tables (CSV, TSV, JSON lines, Parquet, Arrow), each read as a table of
Arrow: with pictures inside, or in the files that it names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Sized
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
from cloob.data.source import (
    Fingerprint,
    Source,
    column_digest,
    digest,
    first_equal,
    place_in,
    starts_of,
)
from cloob.data.sources.files import reading
from cloob.data.sources.tables import (
    ARROW_SUFFIX,
    TABLE_SUFFIXES,
    as_text,
    check_name,
    is_parquet,
    map_arrow,
    read_table,
    schema_of,
)
from cloob.errors import InputError

SUFFIXES = (*TABLE_SUFFIXES, ARROW_SUFFIX)

IMAGE_COLUMN = "filepath"  # where the user names none
CAPTION_COLUMN = "title"
_BINARY = (pa.binary(), pa.large_binary())
_STRINGS = (pa.string(), pa.large_string())
_TEXTS = (*_BINARY, *_STRINGS, pa.null())
_LISTS = pa.large_list(pa.large_binary())
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
        schemas = [schema_of(path, [image_column, caption_column]) for path in paths]
        first = schemas[0]
        image_column = _found_column(first, image_column, IMAGE_COLUMN, _is_image)
        caption_column = _found_column(first, caption_column, CAPTION_COLUMN, _is_text)
        for path, schema in zip(paths, schemas, strict=True):
            _check_columns(path, schema, image_column, caption_column)
        # whether the pictures are in the tables
        self.holds_images = _is_image(first.field(image_column).type)
        if self.holds_images:
            _check_room(name, paths)
        tables = [
            _read(path, schema, image_column, caption_column)
            for path, schema in zip(paths, schemas, strict=True)
        ]
        n_rows = list(map(len, tables))
        self._starts = starts_of(n_rows)
        columns = pa.concat_tables(tables)
        # by row; one of them may be null
        self._images = columns["image"]
        self._image_paths = columns["path"]
        # the caption of every pair, and (pairs,) its row
        self._captions, self._rows = _pairs(columns["captions"])
        ends = np.searchsorted(self._rows, np.cumsum(n_rows))
        self.shard_sizes = tuple(np.diff(ends, prepend=0).tolist())

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
        number, row_of_table = place_in(self._starts, row)
        table = self._tables[number]
        path = as_text(self._image_paths[row].as_py()).strip()
        where = f"row {row_of_table + 1:,} of {table.name}"
        key = as_utf8(path) or where
        if self.holds_images:
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

    def first_rows(self) -> np.ndarray | None:
        """(N,) int64: per pair the first of its row, or of its path where that has
        several captions; None where no two have the same.
        """
        if self.holds_images:
            pictures = self._rows
        else:
            paths = self._image_paths.take(self._rows)
            pictures = _number_pictures(paths, self._captions)
        first_rows = first_equal(pictures)
        is_repeated = first_rows != np.arange(len(first_rows))
        return first_rows if is_repeated.any() else None

    def fingerprint(self) -> Fingerprint:
        images = [column_digest(self._image_paths)]
        if self.holds_images:
            images = [f"{path.name} {path.stat().st_size}" for path in self._tables]
        return {
            "rows": len(self),
            "images": digest(images),
            "captions": digest([column_digest(self._captions), self._rows]),
        }


def _number_pictures(paths: pa.ChunkedArray, captions: pa.ChunkedArray) -> np.ndarray:
    """(pairs,) numbers, equal for equal paths with several captions: a row that is
    repeated with its caption counts as often.
    """
    pairs = pa.table({"path": paths, "caption": captions})
    counts = pairs.group_by("path").aggregate(
        [("caption", "count_distinct", pc.CountOptions(mode="all"))]
    )
    has_several = pc.greater(counts["caption_count_distinct"], 1)
    shared = counts["path"].filter(has_several)
    shared = shared.filter(pc.not_equal(shared, b"")).combine_chunks()
    numbers = pc.index_in(paths, shared).fill_null(-1).to_numpy()
    # a picture of one pair has a number below 0 of its own
    return np.where(numbers < 0, -1 - np.arange(len(numbers)), numbers)


def _read(
    path: Path, schema: pa.Schema, image_column: str, caption_column: str
) -> pa.Table:
    """A file's rows as bytes, which need not be UTF-8: of pictures or their paths, and
    lists of captions.
    """
    # by the schema: of a text table paths are read as bytes, too
    holds_images = _is_image(schema.field(image_column).type)
    # one can be both
    columns = list(dict.fromkeys((image_column, caption_column)))
    with reading(path):
        if holds_images and is_parquet(path):
            table = map_arrow(_unpacked(path, columns))
        else:
            table = read_table(path, columns)
        if holds_images:
            images, paths = _images_and_paths(table[image_column])
        else:
            images, paths = _nulls(table), _as_bytes(table[image_column])
        captions = _as_lists(table[caption_column])
    return pa.table({"image": images, "path": paths, "captions": captions})


def _found_column(
    schema: pa.Schema, column: str, default: str, fits: Callable[[pa.DataType], bool]
) -> str:
    """The column of a name; where nobody named one, the only one of a kind."""
    fitting: list[str] = [field.name for field in schema if fits(field.type)]
    is_named = column in schema.names or column != default
    return column if is_named or len(fitting) != 1 else fitting[0]


def _check_columns(
    path: Path, schema: pa.Schema, image_column: str, caption_column: str
) -> None:
    """Refuses a file without one of the columns, or with other kinds of them."""
    check_name(path, schema.names, image_column, "image")
    check_name(path, schema.names, caption_column, "caption")
    image = schema.field(image_column).type
    caption = schema.field(caption_column).type
    if not (_is_image(image) or image in _TEXTS):
        expected = "images ({bytes, path}, bytes or paths)"
        raise _wrong_type(path, image_column, image, expected)
    if not (_is_list(caption) or caption in _TEXTS):
        raise _wrong_type(path, caption_column, caption, "text or lists of text")


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
    if needed > Cache().max_bytes:
        raise InputError(
            f"{name}: Parquet is unpacked, and takes some {needed:,} bytes; set"
            " CLOOB_CACHE_BYTES to more, or store Arrow or tars"
        )


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


def _images_and_paths(
    column: pa.ChunkedArray,
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The bytes of pictures, and paths of those that have none."""
    if not pa.types.is_struct(column.type):
        return _as_bytes(column), _nulls(column)
    column.validate()
    images = _as_bytes(pc.struct_field(column, "bytes"))
    if column.type.get_field_index("path") < 0:
        return images, _nulls(column)
    return images, _as_bytes(pc.struct_field(column, "path"))


def _nulls(rows: Sized) -> pa.ChunkedArray:
    """A column of nothing for these rows."""
    return pa.chunked_array([pa.nulls(len(rows), pa.large_binary())])


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
