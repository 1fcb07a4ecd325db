"""Pairs with the images inside the table: Hugging Face ``datasets`` folders, Arrow and Parquet files.

Arrow files are mapped and read in place; compressed ones are refused. Parquet is compressed in groups of rows, so a
single row is costly: each file is turned into an Arrow file in the cache when it is first needed, and the source is
read file by file.

pyarrow alone, not ``datasets``: bad rows are counted and named, no picture is decoded before its size is known, and the
unpacked files are in the one cache.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cloob.cache import Cache
from cloob.data.batch import BadSample, RawSample, clean_caption
from cloob.data.decode import read_image_file
from cloob.data.fingerprint import Fingerprint, digest, of_column
from cloob.data.prefetch import Prefetcher
from cloob.data.sources.columns import READ_ERRORS, checked, map_arrow, open_parquet, read_schema, unpacked
from cloob.errors import InputError, first_of, message
from cloob.pictures import MAX_IMAGE_BYTES

ARROW_SUFFIXES = (".arrow", ".parquet")

_State = tuple[int, int]
"""Size of a file in bytes, and when it was written, in nanoseconds."""

_DEFAULTS = ("filepath", "title")  # of open_source: what nobody has asked for by name
_MAX_OPEN_FILES = 32


class ArrowSource:
    """A random-access source over Arrow or Parquet files with one column of images and one of captions.

    An image is ``{bytes, path}`` as ``datasets.Image`` stores it, bytes, or a path relative to the file's folder. The
    columns default to the only one of their kind. No row becomes a Python object before it is read.

    Args:
        name: What reports call this source.
        paths: The files, in order, all ``.arrow`` or all ``.parquet``.
        image_column: Column with the images.
        caption_column: Column with the captions.
        cache: Where Parquet files are unpacked.

    Raises:
        InputError: No file, a file that is not what its name says, or one without such columns of their kinds.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        image_column: str = _DEFAULTS[0],
        caption_column: str = _DEFAULTS[1],
        cache: Cache | None = None,
    ) -> None:
        if not paths:
            raise InputError(f"{name}: no .arrow or .parquet file found")
        self.name = name
        self._paths = tuple(paths)
        self._cache = cache or Cache()
        self.streamed = any(path.suffix.lower() == ".parquet" for path in paths)
        schemas, sizes, self._states = zip(*(_facts(path) for path in paths), strict=True)
        self._columns = _choose(paths[0], schemas[0], image_column, caption_column)
        for path, schema in zip(paths, schemas, strict=True):
            missing = [column for column in self._columns if column not in schema.names]
            if missing:
                raise InputError(f"{path} has no column {missing[0]!r}, which {paths[0].name} has")
            _check_kinds(path, schema, self._columns)
        self.shard_sizes: tuple[int, ...] = sizes
        self._forget()

    def _forget(self) -> None:
        self._ends = np.cumsum(self.shard_sizes)
        self._opened: OrderedDict[int, pa.Table] = OrderedDict()
        self._prefetcher = Prefetcher(self._file)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> RawSample:
        """The pair at ``index``, or a ``BadSample``; its key is ``file/row``, rows counted from 0 in each file."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[shard]) + self.shard_sizes[shard]
        path = self._paths[shard]
        key = f"{path.name}/{row}"
        table = self._open(shard)
        caption = clean_caption(_bytes(table.column(1)[row]), key, str(path))
        data, stored = picture_in(table.column(0)[row])
        if data is None:
            if not stored:
                raise BadSample("missing image", key, f"{path}: neither bytes nor a path")
            data = read_image_file(path.parent / stored.decode("utf-8", "surrogateescape"), key)
        if len(data) > MAX_IMAGE_BYTES:
            raise BadSample("image too large", key, f"{len(data):,} bytes")
        return RawSample(key, data, caption)

    def fingerprint(self) -> Fingerprint:
        """The files' names and sizes, and their captions: of Arrow files by content, of Parquet by its end."""
        files = [f"{path.name} {path.stat().st_size}" for path in self._paths]
        captions = []
        for shard, path in enumerate(self._paths):
            if path.suffix.lower() == ".parquet":  # its end holds the size and the statistics of each column
                captions.append(_parquet_end(path))
            else:
                captions.append(of_column(self._open(shard).column(1)).encode())
        return {"rows": len(self), "files": digest(files), "captions": digest(captions)}

    def prefetch(self, indices: np.ndarray) -> None:
        """Has the Parquet files of these pairs unpacked in the background."""
        self._prefetcher.want(np.unique(np.searchsorted(self._ends, indices, side="right")).tolist())

    def _open(self, shard: int) -> pa.Table:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        if len(self._opened) >= _MAX_OPEN_FILES and self.streamed:
            self._opened.popitem(last=False)
        for last in (False, False, True):
            try:
                table = checked(map_arrow(self._file(shard)).select(list(self._columns)))
                break
            except FileNotFoundError:  # another process has made room in between
                if last:
                    raise
            except READ_ERRORS as error:
                raise _unreadable(self._paths[shard], error) from None
        if len(table) != self.shard_sizes[shard]:
            raise InputError(
                f"{self._paths[shard]}: its end says {self.shard_sizes[shard]:,} rows, and it holds {len(table):,}; "
                "it is damaged"
            )
        self._opened[shard] = table
        return table

    def _file(self, shard: int) -> Path:
        path, state = self._paths[shard], self._states[shard]
        if path.suffix.lower() != ".parquet":
            _check_unchanged(path, state)
            return path

        def make(target: Path) -> None:
            _check_unchanged(path, state)
            _convert(path, target, self._columns)

        size, mtime_ns = state
        return self._cache.get("tables", f"{path.resolve()} {size} {mtime_ns} {self._columns} {path.stem}.arrow", make)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_opened", "_prefetcher", "_ends")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


def arrow_files(folder: Path) -> list[Path]:
    """The data files of a Hugging Face ``datasets`` folder or of a folder of Arrow or Parquet files; [] if it is none.

    Raises:
        InputError: The folder holds several splits, or a file is missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", lambda content: content["splits"])
        raise InputError(f"{folder} holds the splits {', '.join(splits)}; name one: {folder / splits[0]}")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        names = _listed(folder / "state.json", lambda state: [file["filename"] for file in state["_data_files"]])
        paths = [folder / name for name in names]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise InputError(f"{missing[0]}: no such file, but {folder / 'state.json'} names it")
        return paths
    for place in (folder, folder / "data"):
        if place.is_dir():
            paths = sorted(path for path in place.iterdir() if path.suffix.lower() in ARROW_SUFFIXES)
            splits = sorted({path.name.partition("-")[0] for path in paths if "-of-" in path.name})
            if len(splits) > 1:
                raise InputError(
                    f"{place} holds the splits {', '.join(splits)}; name the files of one: "
                    f"{place / splits[0]}-*{paths[0].suffix}"
                )
            if paths:
                return paths
    return []


def _listed(file: Path, names_in: Callable[[Any], Any]) -> list[str]:
    """The names that a JSON file of the package datasets lists, each of something beside it; InputError for others."""
    names = None
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        names = names_in(json.loads(file.read_bytes()))
    if names and isinstance(names, list) and all(_is_beside(name) for name in names):
        return names
    raise InputError(
        f"{file}: does not list what lies beside it, as the package datasets writes it; save the set again"
    )


def _is_beside(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name != ".." and name.isprintable()


def holds_images(path: Path, image_column: str) -> bool:
    """Whether a Parquet file has its images inside, and not as paths."""
    try:
        schema = read_schema(path)
    except READ_ERRORS:
        return False  # the reader of tables says what is wrong
    if schema.names.count(image_column) == 1:
        return is_image(schema.field(image_column).type)
    return image_column == _DEFAULTS[0] and any(is_image(field.type) for field in schema)


def _facts(path: Path) -> tuple[pa.Schema, int, _State]:
    """Columns and number of rows of a file, and the state that it has them in."""
    try:
        state = _state(path)
        if path.suffix.lower() == ".parquet":
            with open_parquet(path) as file:
                return file.schema_arrow, file.metadata.num_rows, state
        table = map_arrow(path)
        return table.schema, table.num_rows, state
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    said = " ".join(str(error).split())[:300]
    return InputError(f"{path} cannot be read as {path.suffix[1:].lower()}: {said}")


def _state(path: Path) -> _State:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _check_unchanged(path: Path, state: _State) -> None:
    """Refuses a file that is not any more the one whose rows have been counted."""
    try:
        changed = _state(path) != state
    except OSError as error:
        raise InputError(message(error)) from None
    if changed:
        raise InputError(f"{path}: has changed since the run began; start it again")


def _parquet_end(path: Path) -> bytes:
    """The footer of a Parquet file, whose length is in front of the magic word that ends it."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        size = int.from_bytes(file.read(4), "little")
        file.seek(-8 - size, os.SEEK_END)
        return file.read(size)


def _convert(path: Path, target: Path, columns: tuple[str, str]) -> None:
    try:
        path.stat()  # Arrow's own error would not have the file's name
        whole = read_schema(path)
        schema = pa.schema([whole.field(column) for column in columns])
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in unpacked(path, list(dict.fromkeys(columns))):
                writer.write_batch(batch.select(list(columns)))
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None and getattr(error, "filename", None) != str(path):
            raise  # of the disk that is written to
        raise InputError(f"{path}: cannot be read as Parquet ({message(error)})") from error


def _choose(path: Path, schema: pa.Schema, image_column: str, caption_column: str) -> tuple[str, str]:
    """The two columns: those named, or the only ones of their kind when the defaults are not there."""
    columns: list[str] = []
    kinds = (("image", image_column, is_image), ("caption", caption_column, _is_text))
    for (kind, column, fits), default in zip(kinds, _DEFAULTS, strict=True):
        if column not in schema.names:
            options = [field.name for field in schema if fits(field.type)]
            if column != default or len(options) != 1:
                raise InputError(
                    f"{path} has no column {column!r}; its columns: {first_of(schema.names)} "
                    f"(name the one of the {kind}s with --{kind}-column)"
                )
            column = options[0]
        columns.append(column)
    return columns[0], columns[1]


def _check_kinds(path: Path, schema: pa.Schema, columns: tuple[str, str]) -> None:
    """Refuses a file whose columns hold anything but images and text; one that is empty all over has no type."""
    check_pictures(path, schema, columns[0])
    _check_single(path, schema, columns[1])
    caption = schema.field(columns[1]).type
    if not (_is_text(caption) or pa.types.is_null(caption)):
        raise InputError(f"{path}: column {columns[1]!r} holds {caption}, not text")


def check_pictures(path: Path, schema: pa.Schema, column: str) -> None:
    """Refuses a column that is there twice, or holds neither pictures nor paths; one that is empty has no type."""
    _check_single(path, schema, column)
    kind = schema.field(column).type
    if not (_is_text(kind) or is_image(kind) or pa.types.is_null(kind)):
        raise InputError(f"{path}: column {column!r} holds {kind}, not images ({{bytes, path}}, bytes or paths)")


def _check_single(path: Path, schema: pa.Schema, column: str) -> None:
    if schema.names.count(column) > 1:
        raise InputError(f"{path} has several columns {column!r}; rename all but one")


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this kind holds pictures: bytes, or ``{bytes, path}`` as ``datasets.Image`` has them."""
    if not pa.types.is_struct(kind):
        return _is_binary(kind)
    data = [field.type for field in kind if field.name == "bytes"]
    paths = [field.type for field in kind if field.name == "path"]
    return (
        len(data) == 1
        and _is_binary(data[0])
        and len(paths) <= 1
        and all(_is_text(each) or _is_binary(each) or pa.types.is_null(each) for each in paths)
    )


def picture_in(row: pa.Scalar) -> tuple[bytes | None, bytes | None]:
    """The bytes of a picture and its path, as a row has them of a column that :func:`check_pictures` lets pass."""
    if isinstance(row, pa.StructScalar):
        has_path = row.type.get_field_index("path") >= 0
        return _bytes(row["bytes"]), _bytes(row["path"]) if has_path else None
    return (_bytes(row), None) if _is_binary(row.type) else (None, _bytes(row))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _bytes(value: Any) -> bytes | None:
    """Text or bytes as bytes, whether they are UTF-8 or not."""
    return value.as_buffer().to_pybytes() if value.is_valid else None
