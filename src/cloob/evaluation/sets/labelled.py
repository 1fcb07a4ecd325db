"""Labelled pictures for zero-shot classification: CLIP_benchmark's WebDataset folders, and plain image folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cloob.data.batch import printable, read_image_file
from cloob.data.open import DEMO
from cloob.data.shards.index import group_members
from cloob.data.shards.spec import local_folder
from cloob.data.shards.tar import TarReader, is_tar
from cloob.data.source import IMAGE_EXTENSIONS
from cloob.errors import InputError, first_of, nearest

_DEMO_SETS = {"demo:noto-emoji": "noto-emoji"}
_SPLITS = {"train", "val", "valid", "validation", "test"}
_TEMPLATE_FILES = ("zeroshot_classification_templates.txt", "templates.txt")
_MAX_LABEL_BYTES = 1 << 10


class _Pictures(Protocol):
    def read(self, index: int) -> tuple[str, bytes]: ...


@dataclass(frozen=True)
class LabelledSet:
    """Pictures with a class each, and the words for the classes.

    Attributes:
        name: The folder's name.
        classnames: Name of each class; a label is an index into it.
        templates: Prompts in which ``{c}`` stands for the class name (fill in with ``str.replace``: names may hold
            braces).
        labels: ``(n,)`` int64.
        pictures: Where ``read`` gets the files from.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    labels: np.ndarray
    pictures: _Pictures

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[str, bytes]:
        """Key and encoded image of picture ``index``.

        Raises:
            BadSample: The picture's file cannot be read; it stays in the set and counts as wrong.
            InputError: The shard is gone since the set was opened.
        """
        return self.pictures.read(index)


def open_labelled(path: str | Path, split: str = "test") -> LabelledSet:
    """Opens a labelled set: ``"demo:noto-emoji"`` (inside the package), or a folder in one of two layouts.

    - CLIP_benchmark's: ``classnames.txt`` (line number = label), ``zeroshot_classification_templates.txt``,
      ``<split>/nshards.txt``, ``<split>/<i>.tar`` with an image and a ``.cls`` a sample;
    - images: one sub-folder a class (in ``<split>/`` if that is a folder of folders). A class is called as its folder,
      ``_`` read as a space, or as its line of ``classnames.txt`` says (sorted folders).

    Templates are optional in both (``templates.txt`` is read too); without, ``("{c}",)``.

    Raises:
        InputError: Something is missing or does not fit; names the set, the file and the key.
    """
    if str(path).startswith("demo:"):
        if str(path) not in _DEMO_SETS:
            raise InputError(f"no labelled demo set {str(path)!r}: {nearest(str(path), _DEMO_SETS)}")
        path = DEMO / _DEMO_SETS[str(path)]
    folder = local_folder(path, "labelled pictures")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of labelled pictures")
    part = folder / split
    if part.is_dir() and any(is_tar(file) or file.name == "nshards.txt" for file in part.iterdir()):
        return _open_shards(folder, part)
    if others := sorted(file.parent.name for file in folder.glob("*/nshards.txt")):
        raise InputError(f"{folder} has no split {split!r}; it has {', '.join(others)}")
    return _open_folders(folder, part if part.is_dir() and subfolders(part) else folder)


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted by name; by number if all names are whole numbers."""
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if all(p.name.isdecimal() for p in folders):
        folders.sort(key=lambda p: int(p.name))
    return folders


class FilePictures:
    """Pictures by their paths below a folder, which are their keys as well."""

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self._root = root
        self._paths = tuple(paths)

    def read(self, index: int) -> tuple[str, bytes]:
        """Key and encoded image; raises ``BadSample`` if the file cannot be read."""
        path = self._paths[index]
        key = printable(path)
        return key, read_image_file(self._root / path, key)


class _TarPictures:
    def __init__(self, reader: TarReader, places: Sequence[tuple[str, int, int, int]]) -> None:
        self._reader = reader
        self._places = tuple(places)  # key, shard, offset, size

    def read(self, index: int) -> tuple[str, bytes]:
        key, shard, offset, size = self._places[index]
        try:
            return key, self._reader.read(shard, offset, size)
        except OSError as error:
            raise InputError(f"{self._reader.paths[shard]}: {error.strerror or error}") from None


def _open_shards(folder: Path, part: Path) -> LabelledSet:
    classnames = _read_lines(folder / "classnames.txt")
    if classnames is None:
        raise InputError(f"{folder} has no classnames.txt (one class name a line, line number = label)")
    reader = TarReader(_shard_paths(part))
    places: list[tuple[str, int, int, int]] = []
    labels: list[int] = []
    for shard, path in enumerate(reader.paths):
        listing = reader.listing(shard)
        if listing.cut is not None:
            raise InputError(f"{path} is truncated ({listing.cut}): a test set must be whole, get the file again")
        for key, (image, cls) in group_members(listing.members, (IMAGE_EXTENSIONS, ("cls",))).items():
            if image is None or cls is None:
                raise InputError(f"{path}: sample {key!r} has no {'image' if image is None else '.cls label'}")
            text = reader.read(shard, cls.offset, min(cls.size, _MAX_LABEL_BYTES)).decode("utf-8", "replace").strip()
            if not text.isdecimal() or int(text) >= len(classnames):
                numbers = (
                    f"a number from 0 to {len(classnames) - 1}, for the {len(classnames)} classes of classnames.txt"
                )
                raise InputError(f"{path}: sample {key!r} has the label {text[:40]!r}, expected {numbers}")
            labels.append(int(text))
            places.append((f"{path.name}/{key}", shard, image.offset, image.size))
    if not labels:
        raise InputError(f"{part} holds no samples (an image and a .cls each)")
    pictures = _TarPictures(reader, places)
    return LabelledSet(folder.name, classnames, _templates(folder), np.array(labels, np.int64), pictures)


def _shard_paths(part: Path) -> tuple[Path, ...]:
    counter = part / "nshards.txt"
    if not counter.is_file():
        return tuple(sorted(path for path in part.iterdir() if is_tar(path) and path.is_file()))
    text = counter.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{counter} holds {text[:40]!r}, expected the number of shards")
    paths = []
    for i in range(int(text)):
        paths.append(part / f"{i}.tar")
        if not paths[-1].is_file():
            raise InputError(f"{paths[-1]}: no such file, although {counter.name} counts {text} shards")
    return tuple(paths)


def _open_folders(folder: Path, root: Path) -> LabelledSet:
    names = [path.name for path in subfolders(root)]
    if names and set(names) <= _SPLITS:
        one = root / names[-1]
        raise InputError(f"{root} holds splits ({first_of(names)}), not classes; give the folder of one, such as {one}")
    if not names:
        raise InputError(
            f"{root} has no sub-folder: expected one a class, or classnames.txt and <split>/<i>.tar shards"
        )
    classnames = _read_lines(folder / "classnames.txt")
    if classnames is None:
        classnames = tuple(printable(name).replace("_", " ") for name in names)
    elif len(classnames) != len(names):
        raise InputError(
            f"{folder / 'classnames.txt'} names {len(classnames)} classes, but {root} has {len(names)} sub-folders"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        images = _images_below(root, name)
        if not images:
            raise InputError(f"{root / name}: no image in this class folder ({', '.join(IMAGE_EXTENSIONS)})")
        paths += images
        labels += [label] * len(images)
    name, pictures = folder.resolve().name, FilePictures(root, paths)
    return LabelledSet(name, classnames, _templates(folder), np.array(labels, np.int64), pictures)


def _images_below(root: Path, name: str) -> list[str]:
    suffixes = tuple(f".{ext}" for ext in IMAGE_EXTENSIONS)
    return sorted(
        (Path(at).relative_to(root) / file).as_posix()
        for at, _, files in os.walk(root / name)
        for file in files
        if file.lower().endswith(suffixes) and not file.startswith(".")
    )


def _templates(folder: Path) -> tuple[str, ...]:
    for name in _TEMPLATE_FILES:
        if templates := _read_lines(folder / name, "{c}"):
            return templates
    return ("{c}",)


def _read_lines(path: Path, wanted: str = "") -> tuple[str, ...] | None:
    """The lines of a file, none of them empty or without ``wanted``; None if there is no such file."""
    if not path.exists():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not lines:
        raise InputError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f"{path}: line {number} is empty, and a line's number is its label")
        if wanted not in line:
            raise InputError(f"{path}: line {number} has no {wanted} for the class name: {line!r}")
    return tuple(line.strip() for line in lines)
