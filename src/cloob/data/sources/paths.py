"""Pairs of picture files: listed in a table (CSV, TSV, Parquet, JSON lines), or in a
folder next to their captions.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from cloob.data.batch import (
    BadSample,
    RawSample,
    as_utf8,
    clean_caption,
    read_pair_file,
)
from cloob.data.source import (
    CAPTION_SUFFIXES,
    IMAGE_EXTENSIONS,
    IMAGE_SUFFIXES,
    Fingerprint,
    Source,
    digest,
    first_equal,
    of_column,
    spread,
)
from cloob.data.sources.arrow import check_name, is_list
from cloob.data.sources.files import reading
from cloob.errors import InputError, counted

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")

FILE_COLUMN = "file_name"
"""The column of pictures in an imagefolder's table; as the caption column of a folder,
file names are captions.
"""
_DELIMITERS = ("\t", ",", ";", "|")
_BLOCK_BYTES = (
    32 * 1024 * 1024
)  # a row must fit into one block; a caption of a megabyte is only a bad sample


class TableSource(Source):
    """Rows of a table, as two Arrow columns; ``stray`` are rows with a field that holds
    rows, see ``_stray_quotes``.
    """

    streamed = False

    def __init__(self, path: Path, image_column: str, caption_column: str) -> None:
        self.name = str(path)
        self._path = path
        columns = tuple(
            dict.fromkeys((image_column, caption_column))
        )  # one may be both
        there = column_names(path, columns)
        check_name(path, there, image_column, "image")
        check_name(path, there, caption_column, "caption")
        table, self.stray = read_table(path, columns)
        texts = []
        for name in (image_column, caption_column):
            column = table.column(name)
            try:
                is_bytes = column.type in (pa.binary(), pa.large_binary())
                texts.append(
                    column
                    if is_bytes
                    else column.cast(pa.large_string()).cast(pa.large_binary())
                )
            except pa.ArrowException:
                raise InputError(
                    f"{path}: column {name!r} holds {column.type}, not text"
                ) from None
        self._images, self._captions = texts
        del table, texts, column
        # parsing takes about as much again as the columns
        pa.default_memory_pool().release_unused()
        self.shard_sizes = (len(self._images),)
        rows, lines = (
            counted(len(self.stray), "rows"),
            counted(sum(self.stray.values()), "lines"),
        )
        first = (
            f"stray quotes in {rows}, first in row {min(self.stray, default=0) + 1:,}"
        )
        self.remark = (
            f"{first}, take in {lines}: close or double each" if self.stray else ""
        )

    def fingerprint(self) -> Fingerprint:
        return {
            "rows": len(self),
            "image paths": of_column(self._images),
            "captions": of_column(self._captions),
        }

    def pictures(self) -> np.ndarray | None:
        """(N,) int64: per row the first of its path, where that has several captions;
        None where no path has.
        """
        paths, captions = (
            column.dictionary_encode().combine_chunks().indices.fill_null(-1)
            for column in (self._images, self._captions)
        )
        path = paths.to_numpy().astype(np.int64)
        n = len(path)
        # a path once for each of its captions; n + 1 is above every code
        distinct = np.unique(path * (n + 1) + captions.to_numpy()) // (n + 1)
        is_several = np.isin(path, distinct[1:][distinct[1:] == distinct[:-1]])
        is_several &= pc.fill_null(pc.not_equal(self._images, b""), False).to_numpy()
        if not is_several.any():
            return None
        return first_equal(np.where(is_several, path, -1 - np.arange(n)))

    def row(self, index: int) -> tuple[str, bytes | None]:
        """Path of the image and caption of row ``index`` (from 0) as the table has
        them; no image is opened.
        """
        return (
            as_text(self._images[index].as_py()).strip(),
            self._captions[index].as_py(),
        )

    def picture(self, stored: str, key: str = "", where: str = "") -> bytes:
        return read_pair_file(
            self._path.parent / stored, key or as_utf8(stored), "image", where
        )

    def read(self, index: int) -> RawSample:
        """The pair in row ``index`` (from 0); its key is the image path, and a
        ``BadSample`` counts rows from 1.
        """
        where = f"row {index + 1:,} of {self._path.name}"
        if index in self.stray:
            lines = counted(self.stray[index], "lines")
            raise BadSample(
                "stray quote",
                where,
                f"{where}: a field takes in {lines} that look like rows",
            )
        key, caption = self.caption(index)
        stored, _ = self.row(index)
        return RawSample(key, self.picture(stored, key, where), caption)

    def caption(self, index: int) -> tuple[str, str]:
        """Key and caption of a row, whose picture is not opened."""
        where = f"row {index + 1:,} of {self._path.name}"
        stored, raw = self.row(index)
        key = as_utf8(stored) or where
        return key, clean_caption(raw, key, where)


def as_text(raw: Any) -> str:
    """What a cell holds as text; bytes that are not UTF-8 become surrogates."""
    return (
        raw.decode("utf-8", "surrogateescape")
        if isinstance(raw, bytes)
        else ""
        if raw is None
        else str(raw)
    )


def column_names(path: Path, required: Sequence[str]) -> list[str]:
    """A table's columns, of JSON up to the line where all of ``required`` are there;
    they also tell the delimiter.
    """
    with reading(path):
        match path.suffix.lower():
            case ".csv" | ".tsv":
                return _header(path, required)[1]
            case ".parquet":
                return list(parquet.read_schema(path).names)
    names: dict[str, None] = {}
    for row in json_rows(path):
        names |= dict.fromkeys(row)
        if names.keys() >= {*required}:
            break
    return list(names)


def read_table(path: Path, columns: Sequence[str]) -> tuple[pa.Table, dict[int, int]]:
    """Columns of a table, those of text tables as bytes; and its rows with a stray
    quote, see ``_stray_quotes``.
    """
    with reading(path):
        match path.suffix.lower():
            case ".csv" | ".tsv":
                delimiter, names = _header(path, columns)
                table = arrow_csv.read_csv(
                    path,
                    read_options=arrow_csv.ReadOptions(
                        column_names=names, skip_rows=1, block_size=_BLOCK_BYTES
                    ),
                    parse_options=arrow_csv.ParseOptions(
                        delimiter=delimiter, newlines_in_values=True
                    ),
                    convert_options=arrow_csv.ConvertOptions(
                        include_columns=columns,
                        column_types=dict.fromkeys(columns, pa.binary()),
                        check_utf8=False,
                    ),
                )
                return table, _stray_quotes(table, delimiter)
            case ".parquet":
                table = parquet.ParquetFile(path).read(columns=list(columns))
                places = [table.column_names.index(column) for column in columns]
                return _without_lists(table.select(places)), {}
    rows: list[Sequence[bytes | None]] = []
    for row in json_rows(path):
        cells = (row.get(column) for column in columns)
        lists = (cell if isinstance(cell, list) and cell else [cell] for cell in cells)
        rows += itertools.product(*(map(_stored, values) for values in lists))
    texts = zip(*rows, strict=True) if rows else [[]] * len(columns)
    return (
        pa.table([pa.array(text, pa.large_binary()) for text in texts], list(columns)),
        {},
    )


def _without_lists(table: pa.Table) -> pa.Table:
    """The table with a row for every text of a list, as of the captions of a
    picture.
    """
    for place, (name, column) in enumerate(
        zip(table.column_names, table.columns, strict=True)
    ):
        if is_list(column.type):
            cells = [cell or [None] for cell in column.to_pylist()]
            rows = np.repeat(np.arange(len(cells)), [len(cell) for cell in cells])
            items = pa.array(itertools.chain(*cells), column.type.value_type)
            table = table.take(rows).set_column(place, name, items)
    return table


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a table of JSON that are not empty; bytes that are not UTF-8 are
    escaped.
    """
    with (
        reading(path),
        path.open(encoding="utf-8-sig", errors="surrogateescape") as file,
    ):
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    row.keys()
                except (ValueError, RecursionError, AttributeError) as error:
                    raise InputError(
                        f"{path}: line {number:,} is not JSON or no object: {error}"
                    ) from None
                yield row


def _stored(value: Any) -> bytes | None:
    """A value's bytes in the file; half a surrogate pair, which only an escape can say,
    becomes bytes of no UTF-8.
    """
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _stray_quotes(table: pa.Table, delimiter: str) -> dict[int, int]:
    """The rows with a field of which a line looks like a row, as an unclosed quote
    makes it; and its lines.
    """
    comma = re.escape(delimiter)
    path = rf"[^\s{comma}]+\.(?:{'|'.join(IMAGE_EXTENSIONS)})\"?"
    row = re.compile(
        rf"[\r\n](?:(?:.*{comma})?{path}{comma}|.*{comma}{path}(?:[\r\n]|\Z))".encode(),
        re.IGNORECASE,
    )
    stray = {}
    for column in table.columns:
        several = pc.or_(*(pc.match_substring(column, end) for end in ("\n", "\r")))
        for index in pc.indices_nonzero(several.fill_null(False)).to_pylist():
            if row.search(text := column[index].as_py()):
                stray[index] = len(text.splitlines()) - 1
    return stray


def _header(path: Path, columns: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter and the column names: the first that yields all columns, else that
    of most fields.
    """
    with path.open("rb") as file:
        line = file.readline(csv.field_size_limit())
    header = re.split(r"[\r\n]", line.decode("utf-8-sig", "replace"), maxsplit=1)[0]
    if (
        b"\0" in line
        or line.startswith((b"\xff\xfe", b"\xfe\xff"))
        or not header.strip()
    ):
        wrong = (
            "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8"
            if line.strip()
            else "is empty"
        )
        raise InputError(f"{path} {wrong}; the first line must name the columns")
    written = (
        (delimiter, next(csv.reader([header], delimiter=delimiter)))
        for delimiter in _DELIMITERS
    )
    splits = [
        (delimiter, [name.strip() for name in names]) for delimiter, names in written
    ]
    return max(splits, key=lambda split: ({*columns} <= {*split[1]}, len(split[1])))


class FolderSource(Source):
    """``a/b.jpg`` with ``a/b.txt``, in sub-folders too, sorted by path; ``by_name``
    takes file names as captions.
    """

    streamed = False

    def __init__(self, folder: Path, *, by_name: bool = False) -> None:
        self.name, self._folder, self._by_name, self.pairs = (
            str(folder),
            folder,
            by_name,
            0,
        )
        linked: list[str] = []
        # a picture, or a caption without one; and the name of the picture's caption
        rows: list[tuple[str, str]] = []
        for root, folders, names in walk(folder, _cannot_list):
            linked += [
                path
                for name in folders
                if os.path.islink(path := os.path.join(root, name))  # noqa: PTH114, PTH118
            ]
            below, captions = Path(root).relative_to(folder), captions_by_stem(names)
            pictures = {
                name: name.rpartition(".")[0]
                for name in names
                if name.lower().endswith(IMAGE_SUFFIXES)
            }
            rows += [
                ((below / name).as_posix(), captions.get(stem, ""))
                for name, stem in pictures.items()
            ]
            rows += [
                ((below / captions[stem]).as_posix(), "")
                for stem in captions.keys() - pictures.values()
            ]
            self.pairs += sum(by_name or stem in captions for stem in pictures.values())
        rows.sort()
        first = (
            f"{counted(len(linked), 'linked folders')} not followed, e.g."
            f" {as_utf8(linked[0])}"
            if linked
            else ""
        )
        self.remark = first and f"{first}: give them to --data to read them too"
        stored = (
            pa.array(map(os.fsencode, names), pa.large_binary())
            for names in zip(*rows, strict=True)
        )
        self._paths, self._captions = (
            stored if rows else (pa.array([], pa.large_binary()),) * 2
        )
        self.shard_sizes = (len(rows),)

    def fingerprint(self) -> Fingerprint:
        captions, sizes = [], []
        for path, caption in map(self._files, spread(len(self))):
            with contextlib.suppress(BadSample):
                captions.append(read_pair_file(caption, "", "caption"))
            with contextlib.suppress(OSError):
                sizes.append(str(path.stat().st_size))
        names = of_column(pa.chunked_array([self._paths]))
        digests = {"captions": digest(captions), "sizes of pictures": digest(sizes)}
        return {"pairs": len(self), "file names": names, **digests}

    def read(self, index: int) -> RawSample:
        path, file = self._files(index)
        key = as_utf8(path.relative_to(self._folder).as_posix())
        if path.suffix.lower() in CAPTION_SUFFIXES:
            raise BadSample("missing image", key, f"no image next to {path}")
        image = read_pair_file(path, key, "image")
        named = os.fsencode(re.sub(r"[-_ ]+", " ", path.stem))
        words = named if self._by_name else read_pair_file(file, key, "caption")
        return RawSample(key, image, clean_caption(words, key))

    def _files(self, index: int) -> tuple[Path, Path]:
        name, caption = (
            os.fsdecode(column[index].as_py())
            for column in (self._paths, self._captions)
        )
        path = self._folder / name
        return path, path.with_name(caption) if caption else path.with_suffix(".txt")


def walk(
    folder: Path | str, failed: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """A folder and those below it, as ``os.walk``: without hidden files and folders,
    sorted; links are not followed.
    """
    for root, folders, names in os.walk(folder, onerror=failed):
        folders[:], names[:] = (
            sorted(name for name in item if not name.startswith("."))
            for item in (folders, names)
        )
        yield root, folders, names


def captions_by_stem(names: Iterable[str]) -> dict[str, str]:
    """The caption files among names, by what they share with their picture's name;
    ``.txt`` before others.
    """
    captions: dict[str, str] = {}
    for name in names:
        stem, _, extension = name.rpartition(".")
        if name.lower().endswith(CAPTION_SUFFIXES) and (
            extension == "txt" or stem not in captions
        ):
            captions[stem] = name
    return captions


def metadata_of(folder: Path) -> Path | None:
    """The table of a Hugging Face imagefolder."""
    for path in (folder / "metadata.csv", folder / "metadata.jsonl"):
        if path.is_file() and FILE_COLUMN in column_names(path, (FILE_COLUMN,)):
            return path
    return None


def _cannot_list(error: OSError) -> None:
    folder = as_utf8(str(error.filename))
    raise InputError(
        f"{folder}: cannot be listed ({error.strerror}); make it readable, or move it"
        " elsewhere"
    ) from None
