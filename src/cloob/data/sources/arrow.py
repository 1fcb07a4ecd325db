"""Pairs in tables (CSV, TSV, JSON lines, Parquet, Arrow), each read as a table of
Arrow: with pictures inside, or in the files that it names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
_MAGIC = b"ARROW1"  # a file begins so; a stream has none
_ROWS = 64  # of a batch of pictures


@dataclass(frozen=True)
class _File:
    """A file of rows, of each of which every caption makes a pair; columns are of bytes
    that need not be UTF-8.
    """

    path: Path
    inside: bool  # whether the pictures are in the table
    images: pa.ChunkedArray  # by row, or null
    image_paths: pa.ChunkedArray  # by row, or null
    captions: pa.ChunkedArray  # by pair
    rows: np.ndarray  # (pairs,)

    def key(self, pair: int) -> str:
        if self.inside:
            return f"{self.path.name}/{self.rows[pair]}"
        return as_utf8(self.image_path(pair)) or self.where(pair)

    def where(self, pair: int) -> str:
        """The place of a pair in words."""
        return f"row {self.rows[pair] + 1:,} of {self.path.name}"

    def image_path(self, pair: int) -> str:
        return as_text(self.image_paths[int(self.rows[pair])].as_py()).strip()

    def caption(self, pair: int) -> str:
        stored = self.captions[pair].as_py()
        return clean_caption(stored, self.key(pair), self.where(pair))

    def image(self, pair: int) -> bytes:
        """The picture's file: in its row, or next to the table."""
        key = self.key(pair)
        where = self.where(pair)
        data: bytes | None = self.images[int(self.rows[pair])].as_py()
        path = self.image_path(pair)
        if data is None and path:
            return read_pair_file(self.path.parent / path, key, "image", where)
        if data is None:
            raise BadSample("missing image", key, f"{where}: neither bytes nor a path")
        if len(data) > MOST_BYTES["image"]:
            raise BadSample("image too large", key, f"{where}: {len(data):,} bytes")
        return data


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
        schema = _schema(paths[0], [image_column, caption_column])
        image_column = _found_column(schema, image_column, _is_image)
        caption_column = _found_column(schema, caption_column, _is_text)
        if _holds_images(schema, image_column):
            _check_room(name, list(filter(is_parquet, paths)))
        self._files = [_open(path, image_column, caption_column) for path in paths]
        self.inside = self._files[0].inside
        self.shard_sizes = tuple(len(file.rows) for file in self._files)
        self._ends = np.cumsum(self.shard_sizes)

    def __reduce__(self) -> tuple[object, ...]:  # a spawned worker opens the files
        return TableSource, self._arguments

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is the path of its image, or of one in the
        table ``file/row``, counted from 0. A ``BadSample`` counts rows from 1.
        """
        file, pair = self._place(index)
        caption = file.caption(pair)
        return RawSample(file.key(pair), file.image(pair), caption)

    def caption(self, index: int) -> tuple[str, str]:
        """Key and caption of a pair, whose picture is not opened."""
        file, pair = self._place(index)
        return file.key(pair), file.caption(pair)

    def _place(self, index: int) -> tuple[_File, int]:
        """The file of a pair, and its number there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number]) - self.shard_sizes[number]
        return self._files[number], index - start

    def pictures(self) -> np.ndarray | None:
        """(N,) int64: per pair the first of its row, or of its path where that has
        several captions; None where no two have the same.
        """
        if self.inside:
            # a row has as many captions as pairs follow it
            starts = self._ends - self.shard_sizes
            rows = [
                start + file.rows
                for start, file in zip(starts, self._files, strict=True)
            ]
            pictures = np.concatenate(rows)
        else:
            paths = _joined([file.image_paths.take(file.rows) for file in self._files])
            captions = _joined([file.captions for file in self._files])
            pictures = _with_several(paths, captions)
        first = first_equal(pictures)
        return None if len(np.unique(first)) == len(first) else first

    def fingerprint(self) -> Fingerprint:
        images: list[str] = []
        captions: list[str | np.ndarray] = []
        for file in self._files:
            if file.inside:
                images.append(f"{file.path.name} {file.path.stat().st_size}")
            else:
                images.append(of_column(file.image_paths))
            captions += [of_column(file.captions), file.rows]
        found = {"images": digest(images), "captions": digest(captions)}
        return {"rows": len(self), **found}


def _joined(columns: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    chunks = [chunk for column in columns for chunk in column.chunks]
    return pa.chunked_array(chunks, pa.large_binary())


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


def _open(path: Path, image_column: str, caption_column: str) -> _File:
    """Opens a file of which two columns are the pairs."""
    schema = _schema(path, [image_column, caption_column])
    check_name(path, schema.names, image_column, "image")
    check_name(path, schema.names, caption_column, "caption")
    image = schema.field(image_column)
    caption = schema.field(caption_column)
    if not (_is_image(image.type) or image.type in _TEXTS):
        raise _wrong_type(path, image, "images ({bytes, path}, bytes or paths)")
    if not (_is_list(caption.type) or caption.type in _TEXTS):
        raise _wrong_type(path, caption, "text or lists of text")
    # one can be both
    columns = list(dict.fromkeys((image_column, caption_column)))
    inside = _is_image(image.type)
    with reading(path):
        if inside and is_parquet(path):
            table = _map(_unpacked(path, columns))
        elif path.suffix.lower() == ".arrow":
            table = _map(path)
        else:
            table = read_table(path, columns)
        images, image_paths = _images(table[image_column], inside)
        captions, rows = _pairs(table[caption_column])
    return _File(path, inside, images, image_paths, captions, rows)


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
    schema: pa.Schema, column: str, fits: Callable[[pa.DataType], bool]
) -> str:
    """The column of a name; where nobody named one, the only one of a kind."""
    fitting = [field.name for field in schema if fits(field.type)]
    is_named = column in schema.names or column not in (IMAGE_COLUMN, CAPTION_COLUMN)
    return column if is_named or len(fitting) != 1 else str(fitting[0])


def _wrong_type(path: Path, field: pa.Field, expected: str) -> InputError:
    return InputError(
        f"{path}: column {field.name!r} holds {field.type}, not {expected}"
    )


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


def _holds_images(schema: pa.Schema, column: str) -> bool:
    return schema.names.count(column) == 1 and _is_image(schema.field(column).type)


def _check_room(name: str, packed: Sequence[Path]) -> None:
    """Refuses Parquet of more pictures than the cache would keep unpacked."""
    needed = sum(path.stat().st_size for path in packed)
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


def _pairs(captions: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The caption of every pair, and its row; an empty list is a row without one."""
    if not _is_list(captions.type):
        return _as_bytes(captions), np.arange(len(captions))
    captions.validate()
    captions = captions.cast(pa.large_list(pa.large_binary()))
    captions.validate(full=True)
    lengths = pc.list_value_length(captions).fill_null(0)
    nothing = pa.scalar([None], captions.type)
    captions = pc.if_else(pc.equal(lengths, 0), nothing, captions)
    rows = pc.list_parent_indices(captions).to_numpy()
    return pc.list_flatten(captions), rows


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
