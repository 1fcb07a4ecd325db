"""Pictures with one caption or several each, for retrieval: a picture counts once, and each of its captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from cloob.cache import Cache
from cloob.data.batch import BadSample, clean_caption, printable
from cloob.data.open import check_usable, open_source, open_unprobed
from cloob.data.shards.spec import is_pattern, is_remote, local_path
from cloob.data.source import Source
from cloob.data.sources.paths import TableSource
from cloob.errors import InputError, counted


@dataclass(frozen=True)
class CaptionedSample:
    """One encoded picture; a caption that cannot be used is empty and keeps its place."""

    key: str
    image: bytes
    captions: tuple[str, ...]

    @property
    def caption(self) -> str:
        return "\0".join(self.captions)


@dataclass(frozen=True)
class CaptionedSet:
    """Pictures in order, and the sample of each."""

    name: str
    pictures: Sequence[Any]
    sample: Callable[[Any], CaptionedSample]

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> CaptionedSample:
        return self.sample(self.pictures[index])


def open_captioned(spec: str | Path, *, image_column: str = "filepath", caption_column: str = "title") -> CaptionedSet:
    """Opens pictures and captions for retrieval: what :func:`cloob.open_source` takes.

    A picture has several captions in a table with several rows of it, and in CLIP_benchmark's folder of a retrieval set
    (``test/nshards.txt`` in it), where every line of a .txt is a caption. Pictures come in the order of their first.

    Raises:
        InputError: Nothing there, not readable as what it is, or fewer than two pictures.
    """
    spec = str(spec) if is_remote(str(spec)) else local_path(str(spec))
    path = Path(spec)
    if (path / "test" / "nshards.txt").is_file():
        check_type(path, "retrieval")
        return by_picture(path.name, open_source(path / "test"), together=False, by_line=True)
    source = open_unprobed(spec, image_column, caption_column, Cache())
    if isinstance(source, TableSource):  # a picture that is lost keeps its captions as queries
        return _of_table(source)
    check_usable(source)
    pure = PurePath(spec)
    name = "/".join(pure.parts[-2:]) if is_pattern(pure.name) else pure.name
    return by_picture(name, source, together=False)


def check_type(folder: Path, *wanted: str) -> str:
    """The kind of a CLIP_benchmark set, of ``wanted``; classification where it does not say."""
    file = folder / "dataset_type.txt"
    kind = file.read_text(encoding="utf-8", errors="replace").strip().lower() if file.is_file() else "classification"
    if kind not in wanted:
        raise InputError(f"{file} says {kind!r}; {' or '.join(map(repr, wanted))} would be right")
    return kind


def by_picture(name: str, source: Source, *, together: bool = True, by_line: bool = False) -> CaptionedSet:
    """Pairs of a source, equal pictures together with all their captions; ``name`` is what results call them.

    With ``together`` False every row is a picture; ``by_line``: every line of its text is a caption.
    """
    rows: dict[bytes | int, list[int]] = {}
    for row in range(len(source)):
        try:
            same = hashlib.blake2b(source.read(row).image, digest_size=16).digest() if together else row
        except BadSample:
            same = row
        rows.setdefault(same, []).append(row)

    def sample(rows: Sequence[int]) -> CaptionedSample:
        samples = [source.read(row) for row in rows]
        texts = samples[0].caption.splitlines() if by_line else [sample.caption for sample in samples]
        captions = tuple(" ".join(text.split()) for text in texts if text.strip())
        return CaptionedSample(samples[0].key, samples[0].image, captions)

    return CaptionedSet(name, list(rows.values()), sample)


def _of_table(table: TableSource) -> CaptionedSet:
    """Pictures of a table, each with the captions of all rows that name it."""
    captions: dict[str, list[str]] = {}
    faults: dict[str, BadSample] = {}  # the first of every picture
    wrong = ""  # a test set must be complete
    for number in range(len(table)):
        stored, caption = table.row(number)
        if not stored or number in table.stray:
            fault = "a stray quote takes in rows; close it, or double it" if stored else "there is no path"
            wrong = wrong or f"row {number + 1:,}: {fault}"
        try:
            usable = " ".join(clean_caption(caption, printable(stored), f"row {number + 1:,}").split())
        except BadSample as bad:
            faults.setdefault(stored, bad)
            usable = ""
        captions.setdefault(stored, []).append(usable)
    if wrong or len(captions) < 2:
        few = f"{counted(len(captions), 'pictures')}, at least 2 are needed"
        raise InputError(f"{table.name}: {wrong or few}")

    def sample(stored: str) -> CaptionedSample:
        texts = tuple(captions[stored])
        if not any(texts):
            raise faults[stored]
        try:
            return CaptionedSample(stored, table.picture(stored), texts)
        except BadSample as bad:
            bad.captions = texts
            raise

    return CaptionedSet(Path(table.name).name, list(captions), sample)
