"""Pairs in Arrow and Parquet files; Parquet becomes Arrow in the cache, which is
mapped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from cloob.cache import Cache
from cloob.data.batch import BadSample, RawSample, clean_caption, read_pair_file
from cloob.data.source import Fingerprint, Source, digest, of_column
from cloob.data.sources.files import FileSource, reading
from cloob.errors import InputError, first_of
from cloob.pictures import MAX_IMAGE_BYTES

ARROW_SUFFIXES = (".arrow", ".parquet")
NO_PICTURE = "neither bytes nor a path"  # of a row without a picture

IMAGE_COLUMN = "filepath"  # where the user names none
CAPTION_COLUMN = "title"
_BINARY = (pa.binary(), pa.large_binary())
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
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


class ArrowSource(FileSource[pa.Table], Source):
    """Rows of Arrow or Parquet files with a column of images (bytes, paths,
    ``datasets.Image``) and one of captions.

    Of a column of lists of captions every caption makes a pair with the row's image; an
    empty list makes one, a bad sample. Without a column of captions every row has its
    picture, and all columns are read.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        image_column: str = IMAGE_COLUMN,
        caption_column: str | None = CAPTION_COLUMN,
        cache: Cache | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self._cache = cache or Cache()
        self._is_parquet = [is_parquet(path) for path in paths]
        stored = [_schema_and_rows(path) for path in paths]
        self.schemas = [schema for schema, _ in stored]
        sizes = [rows for _, rows in stored]
        self.image = _image_column(self.schemas[0], image_column)
        self._check_columns(self.image, "image")
        self._caption: str | None = None
        self._columns: list[str] | None = None
        self._pair_ends: list[np.ndarray] | None = None  # by row, of lists of captions
        if caption_column is not None:
            self._caption = _caption_column(self.schemas[0], caption_column)
            self._check_columns(self._caption, "caption")
            # one can be both
            self._columns = list(dict.fromkeys((self.image, self._caption)))
            if is_list(self.schemas[0].field(self._caption).type):
                self._pair_ends = [self._count_pairs(path) for path in paths]
                sizes = [int(ends.max(initial=0)) for ends in self._pair_ends]
        super().__init__(name, sizes, streamed=any(self._is_parquet))

    def _check_columns(self, column: str, kind: str) -> None:
        """Refuses files without the column, or with other things in it."""
        fits, expected = is_image, "images ({bytes, path}, bytes or paths)"
        if kind == "caption":
            fits, expected = is_list, "text or lists of text"
        for path, schema in zip(self.paths, self.schemas, strict=True):
            check_name(path, schema.names, column, kind)
            stored = schema.field(column).type
            if not (fits(stored) or _is_text(stored) or pa.types.is_null(stored)):
                raise InputError(
                    f"{path}: column {column!r} holds {stored}, not {expected}"
                )

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
        start = 0
        columns = []
        for ends, size in zip(self._pair_ends, self.shard_sizes, strict=True):
            counts = np.diff(ends, prepend=0)
            columns.append(start + np.repeat(ends - counts, counts))
            start += size
        return np.concatenate(columns)

    def _count_pairs(self, path: Path) -> np.ndarray:
        """(rows,) the number of pairs up to and with every row of a file."""
        with reading(path):
            if is_parquet(path):
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
        """A digest that changes with the captions of a file; of Parquet its metadata,
        which is read fast.
        """
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
        key = f"{path.name}/{row}"
        data, stored = _image_in(table.column(self.image)[row])
        if data is None and stored:
            return read_pair_file(path.parent / os.fsdecode(stored), key, "image")
        if data is None:
            raise BadSample("missing image", key, f"{path}: {NO_PICTURE}")
        if len(data) > MAX_IMAGE_BYTES:
            raise BadSample("image too large", key, f"{len(data):,} bytes")
        return data

    def prepare(self, shard: int) -> Path:
        """The file to map: of Parquet its unpacked copy in the cache."""
        path = self.paths[shard]
        if not self._is_parquet[shard]:
            return path
        with reading(path):
            stat = path.stat()
        version = stat.st_size, stat.st_mtime_ns
        name = f"{path.resolve()} {version} {self._columns} {path.stem}.arrow"
        return self._cache.get("tables", name, partial(self._unpack, path))

    def _unpack(self, path: Path, target: Path) -> None:
        """Writes a stream, whose dictionaries may differ from batch to batch."""
        with reading(path), parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = self._columns or schema.names
            schema = pa.schema([schema.field(name) for name in names])
            with pa.ipc.new_stream(str(target), schema) as writer:
                for batch in file.iter_batches(_ROWS, columns=names):
                    writer.write_batch(batch.select(names))

    def load(self, shard: int, file: Path) -> pa.Table:
        """Maps a file and checks the offsets of its columns."""
        with reading(self.paths[shard]):
            table = _map(file)
            if self._columns:
                table = table.select(self._columns)
            # its offsets lead into its data; a text that is not UTF-8 is a bad sample
            for column in table.columns:
                column.cast(_as_bytes(column.type)).validate(full=True)
            return table


def is_parquet(path: Path) -> bool:
    """Whether a file is called so."""
    return path.suffix.lower() == ".parquet"


def _schema_and_rows(path: Path) -> tuple[pa.Schema, int]:
    """The schema and the number of rows of a Parquet or Arrow file."""
    with reading(path):
        if is_parquet(path):
            metadata = parquet.read_metadata(path)
            schema, rows = metadata.schema.to_arrow_schema(), metadata.num_rows
        else:
            table = _map(path)
            schema, rows = table.schema, table.num_rows
        _ = schema.names  # UnicodeDecodeError
        return schema, rows


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
    return bool(lists and kind.value_type in _AS_BYTES)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The kind of the same column in which a text need not be UTF-8."""
    if not is_list(kind):
        return _AS_BYTES.get(kind, kind)
    make = pa.large_list if pa.types.is_large_list(kind) else pa.list_
    return make(_AS_BYTES[kind.value_type])


def _bytes(value: pa.Scalar) -> bytes | None:
    return value.as_buffer().to_pybytes() if value.is_valid else None


def _image_in(cell: pa.Scalar) -> tuple[bytes | None, bytes | None]:
    """The bytes of a picture, and the path of its file, as a row has them."""
    if not isinstance(cell, pa.StructScalar):
        stored = _bytes(cell)
        return (None, stored) if _is_text(cell.type) else (stored, None)
    path = _bytes(cell["path"]) if "path" in cell.type.names else None
    return _bytes(cell["bytes"]), path


def _map(path: Path) -> pa.Table:
    """A file or a stream of Arrow, mapped; what is compressed takes its size in
    memory.
    """
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
        return reader(source).read_all()
