"""Pairs with the images inside the table: Hugging Face ``datasets`` folders, Arrow and Parquet files.

Arrow files are mapped and read in place; compressed ones are refused. A single row of Parquet is costly: each file is
turned into an Arrow file in the cache when it is first needed, and the source is read file by file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from cloob.cache import Cache
from cloob.data.batch import BadSample, RawSample, clean_caption, read_image_file
from cloob.data.fingerprint import Fingerprint, digest, of_column
from cloob.data.sources.files import FileSource
from cloob.data.sources.table import check_name
from cloob.errors import InputError, message, one_line
from cloob.pictures import MAX_IMAGE_BYTES

ARROW_SUFFIXES = (".arrow", ".parquet")
NO_PICTURE = "neither bytes nor a path"
"""What a row says that holds no picture and never will."""

_READ_ERRORS = (OSError, UnicodeDecodeError, pa.ArrowException)  # UnicodeDecodeError: a column's name
_DEFAULTS = ("filepath", "title")  # of open_source: what nobody has asked for by name
_BINARY = (pa.binary(), pa.large_binary())
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
_MAGIC = b"ARROW1"  # a file begins so; a stream has none
_ROWS = 64  # of a batch of pictures
_POOL = pa.proxy_memory_pool(pa.default_memory_pool())  # for mapped files alone; only what is compressed takes from it


class ArrowSource(FileSource[pa.Table]):
    """A random-access source over Arrow or Parquet files with one column of images and one of captions.

    An image is ``{bytes, path}`` as ``datasets.Image`` stores it, bytes, or a path relative to the file's folder. The
    columns default to the only ones of their kinds. Without captions, for an index, all columns are read.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        image_column: str = _DEFAULTS[0],
        caption_column: str | None = _DEFAULTS[1],
        cache: Cache | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self._cache = cache or Cache()
        self._states = [_state(path) for path in paths]
        self.schemas, sizes = zip(*map(_schema_and_rows, paths), strict=True)
        super().__init__(name, sizes, streamed=any(map(_is_parquet, paths)))
        self.image = _column(self.schemas[0], image_column, is_image)
        self._caption = caption_column and _column(self.schemas[0], caption_column, is_text)
        self._columns = list(dict.fromkeys((self.image, self._caption))) if self._caption else None  # one can be both
        for path, schema in zip(paths, self.schemas, strict=True):
            _check(path, schema, self.image, "image")
            if self._caption:
                _check(path, schema, self._caption, "caption")

    def read(self, index: int) -> RawSample:
        """The pair at ``index``, or a ``BadSample``; its key is ``file/row``, rows counted from 0 in each file."""
        shard, row = self.place(index)
        path = self.paths[shard]
        key = f"{path.name}/{row}"
        caption = clean_caption(_bytes(self.opened(shard).column(self._caption)[row]), key, str(path))
        return RawSample(key, self.picture(index), caption)

    def fingerprint(self) -> Fingerprint:
        files = [f"{path.name} {path.stat().st_size}" for path in self.paths]
        captions = [
            _parquet_end(path) if _is_parquet(path) else of_column(self.opened(shard).column(self._caption)).encode()
            for shard, path in enumerate(self.paths)
        ]
        return {"rows": len(self), "files": digest(files), "captions": digest(captions)}

    def picture(self, index: int) -> bytes:
        """The bytes of a row's picture: in the row, or in a file beside the table that the row names."""
        shard, row = self.place(index)
        path = self.paths[shard]
        key = f"{path.name}/{row}"
        data, stored = _picture_in(self.opened(shard).column(self.image)[row])
        if data is None and not stored:
            raise BadSample("missing image", key, f"{path}: {NO_PICTURE}")
        if data is None:
            return read_image_file(path.parent / os.fsdecode(stored or b""), key)
        if len(data) > MAX_IMAGE_BYTES:
            raise BadSample("image too large", key, f"{len(data):,} bytes")
        return data

    def prepare(self, shard: int) -> Path:
        path = self.paths[shard]
        if (state := _state(path)) != self._states[shard]:
            raise InputError(f"{path}: has changed since the run began; start it again")
        if not _is_parquet(path):
            return path
        name = f"{path.resolve()} {state} {self._columns} {path.stem}.arrow"
        return self._cache.get("tables", name, lambda target: self._convert(path, target))

    def _convert(self, path: Path, target: Path) -> None:
        """Writes a Parquet file as an Arrow stream, whose dictionaries may differ from batch to batch."""
        columns = self._columns
        try:
            with parquet.ParquetFile(path) as file, pa.OSFile(str(target), "wb") as sink:
                all_of_it = file.schema_arrow
                schema = pa.schema([all_of_it.field(name) for name in columns]) if columns else all_of_it
                with pa.ipc.new_stream(sink, schema) as writer:
                    for batch in file.iter_batches(_ROWS, columns=columns):
                        writer.write_batch(batch.select(columns) if columns else batch)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk that is written to
                raise
            raise _unreadable(path, error) from error

    def load(self, shard: int, file: Path) -> pa.Table:
        try:
            table = _map(file)
            table = table.select(self._columns) if self._columns else table
            for column in table.columns:  # its offsets lead into its own data; a text may be no UTF-8, as its row says
                column.cast(_AS_BYTES.get(column.type, column.type)).validate(full=True)
            return table
        except FileNotFoundError:
            raise
        except _READ_ERRORS as error:
            raise _unreadable(self.paths[shard], error) from None


def arrow_files(folder: Path) -> list[Path]:
    """The data files of a Hugging Face ``datasets`` folder or of a folder of Arrow or Parquet files; [] if it is none.

    InputError for a folder of several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json")))
        raise InputError(f"{folder} holds the splits {splits}; name one: {folder}/SPLIT")
    if (state := folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        try:
            names = [str(file["filename"]) for file in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            names = []
        if not names or any(Path(name).name != name or not name.isprintable() for name in names):
            raise InputError(f"{state}: does not list what lies beside it, as the package datasets writes it")
        return [folder / name for name in names]
    for place in (folder, folder / "data"):
        paths = sorted(path for path in place.glob("*") if path.suffix.lower() in ARROW_SUFFIXES)
        splits = ", ".join(sorted({path.name.partition("-")[0] for path in paths if "-of-" in path.name}))
        if "," in splits:
            raise InputError(f"{place} holds the splits {splits}; name the files of one: {place}/SPLIT-*")
        if paths:
            return paths
    return []


def holds_images(path: Path, image_column: str) -> bool:
    """Whether a Parquet file has its images inside, and not as paths."""
    try:
        schema = parquet.read_schema(path)
    except _READ_ERRORS:
        return False  # the reader of tables says what is wrong
    if schema.names.count(image_column) == 1:
        return is_image(schema.field(image_column).type)
    return image_column == _DEFAULTS[0] and any(is_image(field.type) for field in schema)


def _column(schema: pa.Schema, column: str, fits: Callable[[pa.DataType], bool]) -> str:
    """The column that was named, or the only one of its kind where nobody has named one."""
    options = [field.name for field in schema if fits(field.type)]
    return str(options[0]) if column not in schema.names and column in _DEFAULTS and len(options) == 1 else column


def _check(path: Path, schema: pa.Schema, column: str, kind: str) -> None:
    """Refuses a column that is not there once, or holds nothing of its kind; one that is empty has no type."""
    check_name(path, schema.names, column, kind)
    held = schema.field(column).type
    if not (is_text(held) or pa.types.is_null(held) or (kind == "image" and is_image(held))):
        wanted = "images ({bytes, path}, bytes or paths)" if kind == "image" else "text"
        raise InputError(f"{path}: column {column!r} holds {held}, not {wanted}")


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this kind holds encoded images: bytes, or {bytes, path}."""
    return kind in _BINARY or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def is_text(kind: pa.DataType) -> bool:
    return kind in _AS_BYTES


def _picture_in(cell: pa.Scalar) -> tuple[bytes | None, bytes | None]:
    if isinstance(cell, pa.StructScalar):
        has_path = cell.type.get_field_index("path") >= 0
        return _bytes(cell["bytes"]), _bytes(cell["path"]) if has_path else None
    return (None, _bytes(cell)) if is_text(cell.type) else (_bytes(cell), None)


def _bytes(value: Any) -> bytes | None:
    """Text or bytes as bytes, whether they are UTF-8 or not."""
    return value.as_buffer().to_pybytes() if value.is_valid else None


def _map(path: Path) -> pa.Table:
    """An Arrow file or stream, mapped; InputError if it is compressed."""
    before = _POOL.bytes_allocated()
    with pa.memory_map(str(path)) as source:
        is_file = source.read(len(_MAGIC)) == _MAGIC
        source.seek(0)
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source, memory_pool=_POOL)
        batches = []
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            batches.append(batch)
            if _POOL.bytes_allocated() > before:
                raise InputError(f"{path}: is compressed; save it as Arrow without compression, or as Parquet")
    return pa.Table.from_batches(batches, reader.schema)


def _schema_and_rows(path: Path) -> tuple[pa.Schema, int]:
    try:
        if _is_parquet(path):
            with parquet.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
        else:
            table = _map(path)
            schema, rows = table.schema, table.num_rows
        _ = schema.names  # UnicodeDecodeError
        return schema, rows
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as {path.suffix[1:].lower()}: {one_line(error)}")


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _state(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(message(error)) from None
    return stat.st_size, stat.st_mtime_ns


def _parquet_end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        size = int.from_bytes(file.read(4), "little")
        file.seek(-8 - size, os.SEEK_END)
        return file.read(size)
