"""Pictures with one caption or several each, for retrieval: a picture counts once, and each of its captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from cloob.data.batch import BadSample, RawSample, clean_caption, read_image_file
from cloob.data.content import Reader
from cloob.data.open import open_source
from cloob.data.shards.spec import is_remote, local_path
from cloob.data.source import Source
from cloob.data.sources.arrow import holds_images
from cloob.data.sources.table import TABLE_SUFFIXES, TableSource, check_columns, json_rows
from cloob.errors import InputError, counted

_JSON_SUFFIXES = (".jsonl", ".ndjson")
_TYPE_FILE = "dataset_type.txt"


@dataclass(frozen=True)
class CaptionedSample:
    """One picture: ``image`` is the encoded file; a caption that cannot be used is empty and keeps its place."""

    key: str
    image: bytes
    captions: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The caption, or all of them in one text."""
        return "\0".join(self.captions)


class BadPicture(BadSample):
    """A picture cannot be read, but its captions are known and stay queries."""

    def __init__(self, bad: BadSample, captions: tuple[str, ...]) -> None:
        super().__init__(bad.reason, bad.key, bad.detail)
        self.captions = captions


def open_captioned(spec: str | Path, *, image_column: str = "filepath", caption_column: str = "title") -> Reader:
    """Opens pictures and captions for retrieval: what :func:`cloob.open_source` takes.

    A picture has several captions in a table (.csv, .tsv, .parquet, .jsonl) whose rows name the same picture, in JSON
    lines with a list of captions, and in CLIP_benchmark's folder of a retrieval set (``test/nshards.txt`` in it), where
    each line of a .txt is a caption. Pictures come in the order in which they first appear.

    Raises:
        InputError: Nothing there, not readable as what it is, or fewer than two pictures.
    """
    spec = str(spec) if is_remote(str(spec)) else local_path(str(spec))
    path = Path(spec)
    suffix = path.suffix.lower()
    if suffix in _JSON_SUFFIXES and path.is_file():
        return _Rows(path, _json_rows(path, image_column, caption_column))
    inside = suffix == ".parquet" and path.is_file() and holds_images(path, image_column)
    if suffix in TABLE_SUFFIXES and not inside:
        return _of_table(TableSource(path, image_column, caption_column))
    if (path / "test" / "nshards.txt").is_file():
        if (kind := dataset_type(path)) != "retrieval":
            said = "is not there" if kind is None else f"says {kind!r}"
            wanted = "'retrieval' would be right"
            raise InputError(f"{path} is no set for retrieval: {path / _TYPE_FILE} {said}, {wanted}")
        return _Pairs(_short_name(path), open_source(path / "test"), by_line=True)
    source = open_source(spec, image_column=image_column, caption_column=caption_column)
    return _of_table(source) if isinstance(source, TableSource) else _Pairs(_short_name(spec), source)


def dataset_type(folder: Path) -> str | None:
    """What ``dataset_type.txt`` of a CLIP_benchmark folder says, in lower case; None if there is none."""
    kind = folder / _TYPE_FILE
    return kind.read_text(encoding="utf-8", errors="replace").strip().lower() if kind.is_file() else None


def _short_name(spec: str | Path) -> str:
    """The last part of a path; of a pattern of shards the folder stays: ``/data/cc3m/*.tar`` is ``cc3m/*.tar``."""
    path = PurePath(spec)
    is_pattern = any(sign in path.name for sign in "*?[{")
    return "/".join(path.parts[-2:]) if is_pattern else path.name


@dataclass(frozen=True)
class Renamed:
    """Pictures and captions by another name."""

    reader: Reader
    name: str

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> Any:
        """The sample of the set itself."""
        return self.reader.read(index)


class ByPicture:
    """Pairs of a source, equal pictures together with all their captions; ``name`` is what results call them."""

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self._source = source
        rows: dict[bytes | int, list[int]] = {}
        for row in range(len(source)):
            try:
                rows.setdefault(hashlib.blake2b(source.read(row).image, digest_size=16).digest(), []).append(row)
            except BadSample:
                rows[row] = [row]
        self._rows = list(rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> CaptionedSample:
        """The picture with its captions; raises ``BadSample`` if it cannot be used."""
        samples = [self._source.read(row) for row in self._rows[index]]
        captions = (" ".join(sample.caption.split()) for sample in samples)
        return CaptionedSample(samples[0].key, samples[0].image, tuple(captions))


class _Pairs:
    """A source of pairs; ``by_line``: each line of the text is a caption."""

    def __init__(self, name: str, source: Source, *, by_line: bool = False) -> None:
        self.name = name
        self._source = source
        self._by_line = by_line

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> CaptionedSample:
        sample: RawSample = self._source.read(index)
        texts = sample.caption.splitlines() if self._by_line else [sample.caption]
        captions = tuple(" ".join(text.split()) for text in texts if text.strip())
        return CaptionedSample(sample.key, sample.image, captions)


class _Rows:
    """Pictures of a table, each with the captions of all rows that name it."""

    def __init__(self, path: Path, rows: Iterable[tuple[str, Sequence[bytes | None]]]) -> None:
        self.name = path.name
        self._folder = path.parent
        self._captions: dict[str, list[str]] = {}
        self._faults: dict[str, BadSample] = {}  # the first of each picture
        for number, (key, captions) in enumerate(rows, 1):
            if not key.strip():  # its caption would belong to nothing
                raise InputError(f"{path}: row {number:,} has no path of a picture")
            usable = [self._usable(caption, key.strip(), f"row {number:,}") for caption in captions]
            self._captions.setdefault(key.strip(), []).extend(usable)
        self._keys = list(self._captions)
        if (count := len(self)) < 2:
            raise InputError(f"{path}: {counted(count, 'pictures')}, at least 2 are needed")

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> CaptionedSample:
        key = self._keys[index]
        captions = tuple(self._captions[key])
        if not any(captions):
            raise self._faults[key]
        try:
            return CaptionedSample(key, read_image_file(self._folder / key, key), captions)
        except BadSample as bad:
            raise BadPicture(bad, captions) from None

    def _usable(self, caption: bytes | None, key: str, where: str) -> str:
        """The caption, or an empty one that keeps the place of what cannot be used."""
        try:
            return " ".join(clean_caption(caption, key, where).split())
        except BadSample as bad:
            self._faults.setdefault(key, bad)
            return ""


def _of_table(table: TableSource) -> _Rows:
    path = Path(table.name)
    if table.stray:  # a test set must be whole
        raise InputError(f"{path}: a stray quote in row {min(table.stray) + 1:,} takes in rows; close it, or double it")
    rows = (table.row(i) for i in range(len(table)))
    return _Rows(path, (((image or b"").decode("utf-8", "surrogateescape"), [caption]) for image, caption in rows))


def _json_rows(path: Path, image_column: str, caption_column: str) -> Iterator[tuple[str, list[bytes | None]]]:
    check_columns(path, image_column, caption_column)
    for number, row in json_rows(path):
        image, captions = row.get(image_column), row.get(caption_column)
        texts = captions if isinstance(captions, list) else [captions]
        if not isinstance(image, str):
            raise InputError(f"{path}: line {number:,}: {image_column!r} is no text")
        if not texts or not all(text is None or isinstance(text, str) for text in texts):
            found = json.dumps(captions)[:60]
            wanted = "a text or a list of texts would be right"
            raise InputError(f"{path}: line {number:,}: {caption_column!r} is {found}; {wanted}")
        yield image, [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
