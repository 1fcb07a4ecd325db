"""Pictures to judge by: labelled ones, for zero-shot classification, and ones with
captions, for retrieval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from cloob.data.batch import BadSample, as_utf8, read_pair_file
from cloob.data.open import DEMO, check_usable, open_unprobed
from cloob.data.shards.headers import Member, members_of
from cloob.data.shards.spec import (
    is_pattern,
    is_tar,
    local_folder,
)
from cloob.data.shards.tar import TarReader, group_members, unpacked
from cloob.data.source import IMAGE_EXTENSIONS, IMAGE_SUFFIXES, Source
from cloob.data.sources.arrow import TableSource
from cloob.data.sources.folder import walk
from cloob.errors import InputError, counted, first_of

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
    # key and encoded image; ``BadSample``: it stays in and counts as wrong
    read: Callable[[int], tuple[str, bytes]]

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
    folder = labelled_folder(path)
    part = folder / split
    if _has_shards(part):
        opened = _open_shards(folder, part)
    else:
        opened = _open_folders(folder, split)
    return LabelledSet(
        folder.resolve().name,
        opened.classnames,
        _read_templates(folder),
        np.array(opened.labels),
        opened.read,
    )


def labelled_folder(path: str | Path) -> Path:
    """The folder of a labelled set, also of the one inside the package."""
    if str(path) == "demo:noto-emoji":
        path = DEMO / "noto-emoji"
    return local_folder(path, "labelled pictures")


def _has_shards(part: Path) -> bool:
    if not part.is_dir():
        return False
    return any(is_tar(file) or file.name == "nshards.txt" for file in part.iterdir())


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


def read_picture(root: Path, paths: Sequence[str], index: int) -> tuple[str, bytes]:
    key = as_utf8(paths[index])
    return key, read_pair_file(root / paths[index], key, "image")


class _Opened(NamedTuple):
    """A set without its name and templates."""

    classnames: tuple[str, ...]
    labels: list[int]
    read: Callable[[int], tuple[str, bytes]]


def _open_shards(folder: Path, part: Path) -> _Opened:
    """A test set in tar shards, each sample with a ``.cls``."""
    classnames = _read_lines(folder / "classnames.txt")
    if classnames is None:
        raise InputError(
            f"{folder} has no classnames.txt (one class name a line, line number ="
            " label)"
        )
    paths = _shards(part)
    reader = TarReader(tuple(paths))
    places: list[tuple[str, int, Member]] = []
    labels: list[int] = []
    for shard, path in enumerate(paths):
        for key, (image, cls) in _samples(path).items():
            label = -1 if cls is None else _read_label(reader, shard, cls)
            if image is None or not 0 <= label < len(classnames):
                raise InputError(
                    f"{path}: sample {key!r}: an image and a .cls from 0 to"
                    f" {len(classnames) - 1}, a line of classnames.txt, is expected"
                )
            labels.append(label)
            places.append((f"{path.name}/{key}", shard, image))
    if not labels:
        raise InputError(f"{part} holds no samples (an image and a .cls each)")

    def read(index: int) -> tuple[str, bytes]:
        key, shard, image = places[index]
        return key, reader.read(shard, image.offset, image.size)

    return _Opened(classnames, labels, read)


def _shards(part: Path) -> list[Path]:
    """The tars that nshards.txt counts, or all."""
    counter = part / "nshards.txt"
    if not counter.is_file():
        return sorted(filter(is_tar, part.iterdir()))
    count = counter.read_text(encoding="utf-8", errors="replace").strip()
    if not count.isdecimal():
        raise InputError(f"{counter}: {count[:40]!r} is no number of shards")
    return [part / f"{number}.tar" for number in range(int(count))]


def _samples(shard: Path) -> dict[str, list[Member | None]]:
    """The image and the .cls of every sample of a shard, which must be whole."""
    members, damage = members_of(unpacked(shard))
    if damage:
        raise InputError(
            f"{shard} is truncated ({damage}): a test set must be whole, get the file"
            " again"
        )
    return group_members(members, (IMAGE_EXTENSIONS, ("cls",)))[0]


def _read_label(reader: TarReader, shard: int, cls: Member) -> int:
    """What a .cls file says; -1 if that is no number."""
    size = min(cls.size, _MAX_LABEL_BYTES)
    text = reader.read(shard, cls.offset, size).strip()
    return int(text) if text.isdigit() else -1


def _open_folders(folder: Path, split: str) -> _Opened:
    """A set with a sub-folder a class, of the split if that has sub-folders."""
    root = _root_of_classes(folder, split)
    names = [path.name for path in subfolders(root)]
    classnames = _read_lines(folder / "classnames.txt")
    if classnames is None:
        classnames = tuple(as_utf8(name).replace("_", " ") for name in names)
    if len(classnames) != len(names):
        raise InputError(
            f"{folder / 'classnames.txt'} names {len(classnames)} classes, but {root}"
            f" has {len(names)} sub-folders"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        images = _images_below(root, name)
        if not images:
            raise InputError(f"{root / name}: no image in this class folder")
        paths += images
        labels += [label] * len(images)
    return _Opened(classnames, labels, partial(read_picture, root, paths))


def _root_of_classes(folder: Path, split: str) -> Path:
    """The folder with a sub-folder a class: the split, or the set itself."""
    shards = sorted(file.parent.name for file in folder.glob("*/nshards.txt"))
    if shards:
        raise InputError(f"{folder} has no split {split!r}; it has {', '.join(shards)}")
    part = folder / split
    root = part if part.is_dir() and subfolders(part) else folder
    names = [path.name for path in subfolders(root)]
    if not names:
        raise InputError(
            f"{root} has no sub-folder: expected one a class, or classnames.txt and"
            " <split>/<i>.tar shards"
        )
    if set(names) <= _SPLITS:
        raise InputError(
            f"{root} holds splits ({first_of(names)}); give the folder of one"
        )
    return root


def _images_below(root: Path, name: str) -> list[str]:
    """The pictures of a class folder, relative to ``root``, sorted."""
    images = []
    for place, _, files in walk(root / name):
        below = Path(place).relative_to(root)
        images += [
            (below / file).as_posix()
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES)
        ]
    return sorted(images)


def _read_templates(folder: Path) -> tuple[str, ...]:
    for name in _TEMPLATE_FILES:
        lines = _read_lines(folder / name, needed="{c}")
        if lines is not None:
            return lines
    return ("{c}",)


def _read_lines(path: Path, needed: str = "") -> tuple[str, ...] | None:
    """The lines of a file, None if there is none; InputError for an empty line, or one
    without the ``needed`` text.
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

    A picture has several captions in a table with several rows of it. Pictures come in
    the order of their first.
    """
    spec = str(spec)
    source = open_unprobed(spec, image_column, caption_column)
    path = PurePath(spec)
    name = "/".join(path.parts[-2:]) if is_pattern(path.name) else path.name
    pictures = group_captions(name, source)
    if not isinstance(source, TableSource) or source.holds_images:
        check_usable(source)
    elif len(pictures) < 2:  # a table of paths, whose files may be away
        n_pictures = counted(len(pictures), "pictures")
        raise InputError(f"{source.name}: {n_pictures}, at least 2 are needed")
    return pictures


def group_captions(
    name: str, source: Source, *, by_content: bool = False
) -> CaptionedSet:
    """The pictures of a source, each with the captions of all its rows, as a set that
    results have under ``name``.

    With ``by_content`` all pictures are read, and equal ones are one. A picture that is
    lost keeps its captions as queries.
    """
    rows: dict[object, list[int]] = {}
    first = source.first_rows()
    for row in range(len(source)):
        picture: object = row if first is None else int(first[row])
        if by_content:
            picture = _digest(source, row)
        rows.setdefault(picture, []).append(row)
    read = partial(_read_captioned, source, list(rows.values()))
    return CaptionedSet(name, len(rows), read)


def _digest(source: Source, row: int) -> object:
    """Of a picture; a row that cannot be read is one by itself."""
    try:
        return hashlib.blake2b(source.read(row).image, digest_size=16).digest()
    except BadSample:
        return row


def _read_captioned(
    source: Source, rows_of_pictures: Sequence[Sequence[int]], index: int
) -> CaptionedSample:
    """A picture with all of its captions, read from the first row whose caption is
    usable; BadSample has the captions of a picture that cannot be read.
    """
    rows = rows_of_pictures[index]
    captions = [_usable_caption(source, row) for row in rows]
    usable = [row for row, caption in zip(rows, captions, strict=True) if caption]
    words = tuple(" ".join(text.split()) for text in captions)
    try:
        sample = source.read(usable[0] if usable else rows[0])
    except BadSample as bad:
        bad.captions = words if usable else ()
        raise
    return CaptionedSample(sample.key, sample.image, words)


def _usable_caption(source: Source, row: int) -> str:
    try:
        return source.caption(row)[1]
    except BadSample:
        return ""
