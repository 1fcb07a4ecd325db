"""Pictures to judge by: labelled ones, for zero-shot classification, and ones with
captions, for retrieval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

import numpy as np

from cloob.cache import Cache
from cloob.data.batch import BadSample, as_utf8, clean_caption, read_pair_file
from cloob.data.open import DEMO, check_usable, open_source, open_unprobed
from cloob.data.shards.spec import (
    is_pattern,
    is_remote,
    is_tar,
    local_folder,
    local_path,
)
from cloob.data.shards.tar import TarReader, group_members
from cloob.data.source import IMAGE_EXTENSIONS, IMAGE_SUFFIXES, Source
from cloob.data.sources.folder import walk
from cloob.data.sources.tables import TableSource
from cloob.errors import InputError, counted, first_of, refuse

_SPLITS = {"train", "val", "valid", "validation", "test"}
_TEMPLATE_FILES = ("zeroshot_classification_templates.txt", "templates.txt")
_MAX_LABEL_BYTES = 1 << 10


@dataclass(frozen=True)
class LabelledSet:
    """Pictures with a class each, and the words for the classes."""

    name: str
    classnames: tuple[str, ...]  # a label is an index into it
    # ``{c}`` stands for the class name; fill in with ``str.replace``: names may hold
    # braces
    templates: tuple[str, ...]
    labels: np.ndarray  # (n,) int64
    read: Callable[
        [int], tuple[str, bytes]
    ]  # key and encoded image; ``BadSample``: it stays in and counts as wrong

    def __len__(self) -> int:
        return len(self.labels)


def open_labelled(path: str | Path, split: str = "test") -> LabelledSet:
    """Opens a labelled set: ``"demo:noto-emoji"`` (inside the package), or a folder in
    one of two layouts.

    - CLIP_benchmark's: ``classnames.txt`` (line number = label),
      ``zeroshot_classification_templates.txt``, ``<split>/nshards.txt``,
      ``<split>/<i>.tar`` with an image and a ``.cls`` a sample;
    - images: one sub-folder a class (in ``<split>/`` if that is a folder of folders). A
      class is called as its folder, ``_`` read as a space, or as its line of
      ``classnames.txt``. Templates are optional in both.
    """
    folder = local_folder(
        DEMO / "noto-emoji" if str(path) == "demo:noto-emoji" else path,
        "labelled pictures",
    )
    part = folder / split
    classnames = _read_lines(folder / "classnames.txt")
    if part.is_dir() and any(
        is_tar(file) or file.name == "nshards.txt" for file in part.iterdir()
    ):
        name, opened = folder.name, _open_shards(folder, part, classnames)
    elif others := sorted(file.parent.name for file in folder.glob("*/nshards.txt")):
        raise InputError(f"{folder} has no split {split!r}; it has {', '.join(others)}")
    else:
        root = part if part.is_dir() and subfolders(part) else folder
        name, opened = folder.resolve().name, _open_folders(folder, root, classnames)
    classes, labels, pictures = opened
    templates = next(
        filter(None, (_read_lines(folder / item, "{c}") for item in _TEMPLATE_FILES)),
        ("{c}",),
    )
    return LabelledSet(name, classes, templates, np.array(labels, np.int64), pictures)


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted by name; by number if all names are
    numbers.
    """
    folders = sorted(
        p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")
    )
    if all(p.name.isdecimal() for p in folders):
        folders.sort(key=lambda p: int(p.name))
    return folders


def read_file(root: Path, paths: Sequence[str], index: int) -> tuple[str, bytes]:
    key = as_utf8(paths[index])
    return key, read_pair_file(root / paths[index], key, "image")


_Opened = tuple[tuple[str, ...], list[int], Callable[[int], tuple[str, bytes]]]
"""Names of classes, labels and pictures."""


def _open_shards(
    folder: Path, part: Path, classnames: tuple[str, ...] | None
) -> _Opened:
    counter = part / "nshards.txt"
    count = (
        counter.read_text(encoding="utf-8", errors="replace").strip()
        if counter.is_file()
        else ""
    )
    if classnames is None or (count and not count.isdecimal()):
        no_names = (
            f"{folder} has no classnames.txt (one class name a line, line number ="
            " label)"
        )
        raise InputError(
            f"{counter}: {count[:40]!r} is no number of shards"
            if classnames
            else no_names
        )
    paths = (
        [part / f"{i}.tar" for i in range(int(count))]
        if count
        else sorted(filter(is_tar, part.iterdir()))
    )
    reader = TarReader(tuple(paths))
    places: list[tuple[str, int, int, int]] = []
    labels: list[int] = []
    wrong: list[str] = []
    for shard, path in enumerate(paths):
        members, cut = reader.listing(shard)
        if cut:
            wrong.append(
                f"{path} is truncated ({cut}): a test set must be whole, get the file"
                " again"
            )
        for key, (image, cls) in group_members(members, (IMAGE_EXTENSIONS, ("cls",)))[
            0
        ].items():
            label = (
                reader.read(shard, cls.offset, min(cls.size, _MAX_LABEL_BYTES)).strip()
                if cls
                else b""
            )
            if image is not None and label.isdigit() and int(label) < len(classnames):
                labels.append(int(label))
                places.append((f"{path.name}/{key}", shard, image.offset, image.size))
            else:
                expected = (
                    f"an image and a .cls from 0 to {len(classnames) - 1}, a line of"
                    " classnames.txt"
                )
                wrong.append(f"{path}: sample {key!r}: {expected} is expected")
    if wrong or not labels:
        raise InputError(
            wrong[0] if wrong else f"{part} holds no samples (an image and a .cls each)"
        )
    return (
        classnames,
        labels,
        lambda index: (places[index][0], reader.read(*places[index][1:])),
    )


def _open_folders(
    folder: Path, root: Path, classnames: tuple[str, ...] | None
) -> _Opened:
    names = [path.name for path in subfolders(root)]
    images = []
    for name in names:
        files = (
            (Path(at).relative_to(root) / file).as_posix()
            for at, _, files in walk(root / name)
            for file in files
        )
        images.append(
            sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES))
        )
    holds = (
        f"holds splits ({first_of(names)}); give the folder of one"
        if names
        else "has no sub-folder"
    )
    named = f"{folder / 'classnames.txt'} names {len(classnames or ())} classes"
    empty = [name for name, paths in zip(names, images, strict=True) if not paths]
    one_each = "expected one a class, or classnames.txt and <split>/<i>.tar shards"
    refuse(
        {
            f"{root} {holds}: {one_each}": set(names) <= _SPLITS,
            f"{named}, but {root} has {len(names)} sub-folders": (
                len(classnames or names) != len(names)
            ),
            f"{root / ''.join(empty[:1])}: no image in this class folder": empty,
        }
    )
    labels = [label for label, paths in enumerate(images) for _ in paths]
    classes = classnames or tuple(as_utf8(name).replace("_", " ") for name in names)
    return (
        classes,
        labels,
        partial(read_file, root, [path for paths in images for path in paths]),
    )


def _read_lines(path: Path, needed: str = "") -> tuple[str, ...] | None:
    """The lines of a file, none of them empty or without ``needed``; None if there is
    no such file.
    """
    if not path.exists():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or needed not in line:
            raise InputError(
                f"{path}: line {number} is empty or has no"
                f" {needed or 'name of a class'}: {line!r}"
            )
    return tuple(line.strip() for line in lines)


@dataclass(frozen=True)
class CaptionedSample:
    """One encoded picture; a caption that cannot be used is empty and keeps its
    place.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]

    @property
    def caption(self) -> str:
        return "\0".join(self.captions)


@dataclass(frozen=True)
class CaptionedSet:
    """Pictures in order, with their captions."""

    name: str
    count: int
    read: Callable[[int], CaptionedSample]

    def __len__(self) -> int:
        return self.count


def open_captioned(
    spec: str | Path, *, image_column: str = "filepath", caption_column: str = "title"
) -> CaptionedSet:
    """Opens pictures and captions for retrieval: what :func:`cloob.open_source` takes.

    A picture has several captions in a table with several rows of it, and in
    CLIP_benchmark's folder of a retrieval set (``test/nshards.txt`` in it), where every
    line of a .txt is a caption. Pictures come in the order of their first.
    """
    spec = str(spec) if is_remote(str(spec)) else local_path(str(spec))
    path = Path(spec)
    if (path / "test" / "nshards.txt").is_file():
        check_type(path, "retrieval")
        return by_picture(
            path.name, open_source(path / "test"), together=False, by_line=True
        )
    source = open_unprobed(spec, image_column, caption_column, Cache())
    if isinstance(
        source, TableSource
    ):  # a picture that is lost keeps its captions as queries
        return _of_table(source)
    check_usable(source)
    pure = PurePath(spec)
    name = "/".join(pure.parts[-2:]) if is_pattern(pure.name) else pure.name
    return by_picture(name, source, together=False)


def check_type(folder: Path, *usable: str) -> str:
    """The kind of a CLIP_benchmark set, among ``usable``; classification without a
    dataset_type.txt.
    """
    file = folder / "dataset_type.txt"
    kind = (
        file.read_text(encoding="utf-8", errors="replace").strip().lower()
        if file.is_file()
        else "classification"
    )
    refuse(
        {
            f"{file} says {kind!r}; {' or '.join(map(repr, usable))} would be right": (
                kind not in usable
            )
        }
    )
    return kind


def by_picture(
    name: str, source: Source, *, together: bool = True, by_line: bool = False
) -> CaptionedSet:
    """Pairs of a source, equal pictures together with all their captions; results have
    the set under ``name``.

    With ``together`` False every row is a picture; ``by_line``: every line of its text
    is a caption.
    """
    rows: dict[bytes | int, list[int]] = {}
    for row in range(len(source)):
        try:
            same = (
                hashlib.blake2b(source.read(row).image, digest_size=16).digest()
                if together
                else row
            )
        except BadSample:
            same = row
        rows.setdefault(same, []).append(row)

    pictures = list(rows.values())

    def read(index: int) -> CaptionedSample:
        samples = [source.read(row) for row in pictures[index]]
        texts = (
            samples[0].caption.splitlines()
            if by_line
            else [sample.caption for sample in samples]
        )
        captions = tuple(" ".join(text.split()) for text in texts if text.strip())
        return CaptionedSample(samples[0].key, samples[0].image, captions)

    return CaptionedSet(name, len(pictures), read)


def _of_table(table: TableSource) -> CaptionedSet:
    """Pictures of a table, with the captions of all rows that name them."""
    captions: dict[str, list[str]] = {}
    faults: dict[str, BadSample] = {}  # the first of every picture
    wrong = ""  # a test set must be complete
    for number in range(len(table)):
        stored, caption = table.row(number)
        if not stored or number in table.stray:
            fault = (
                "a stray quote takes in rows; close it, or double it"
                if stored
                else "there is no path"
            )
            wrong = wrong or f"row {number + 1:,}: {fault}"
        try:
            usable = " ".join(
                clean_caption(caption, as_utf8(stored), f"row {number + 1:,}").split()
            )
        except BadSample as bad:
            faults.setdefault(stored, bad)
            usable = ""
        captions.setdefault(stored, []).append(usable)
    few = f"{counted(len(captions), 'pictures')}, at least 2 are needed"
    refuse({f"{table.name}: {wrong or few}": wrong or len(captions) < 2})

    pictures = list(captions)

    def read(index: int) -> CaptionedSample:
        stored = pictures[index]
        texts = tuple(captions[stored])
        if not any(texts):
            raise faults[stored]
        try:
            return CaptionedSample(stored, table.picture(stored), texts)
        except BadSample as bad:
            bad.captions = texts
            raise

    return CaptionedSet(Path(table.name).name, len(pictures), read)
