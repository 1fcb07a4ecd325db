"""Labelled pictures for zero-shot classification: CLIP_benchmark's WebDataset folders, and plain image folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cloob.data.batch import printable
from cloob.data.decode import read_image_file
from cloob.data.open import DEMO
from cloob.data.shards.index import group_members
from cloob.data.shards.spec import local_folder
from cloob.data.shards.tar import Member, TarReader, is_tar
from cloob.data.source import IMAGE_EXTENSIONS
from cloob.errors import InputError, first_of, nearest
from cloob.files import TooLarge, read_at_most

DEFAULT_TEMPLATES = ("{c}",)
_DEMO_SETS = {"demo:noto-emoji": "noto-emoji"}
_SPLITS = {"train", "val", "valid", "validation", "test"}
_NUMBER = re.compile(r"[0-9]{1,7}")
_MOST_BYTES = 1 << 10  # of a file that holds a number alone
_MOST_NAMES = 16 << 20  # bytes
_MOST_LINE = 4096  # characters of a name or a template
_MOST_PLACES = 10  # for the name in a template
_MOST_PROMPTS = 10_000_000
_MOST_CHARACTERS = 250_000_000  # of all prompts; those of ImageNet-21k with 80 templates have some 90 million
_TEMPLATE_FILES = ("zeroshot_classification_templates.txt", "templates.txt")


class _Pictures(Protocol):
    def __len__(self) -> int: ...

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
            BadSample: The picture's file cannot be read, or is too large; it stays in the set and counts as wrong.
            InputError: The shard is gone since the set was opened.
        """
        return self.pictures.read(index)


def open_labelled(path: str | Path, split: str = "test") -> LabelledSet:
    """Opens a labelled set.

    Args:
        path: ``"demo:noto-emoji"`` (inside the package), or a folder in one of two layouts:

            - CLIP_benchmark's: ``classnames.txt`` (line number = label), ``zeroshot_classification_templates.txt``,
              ``<split>/nshards.txt``, ``<split>/<i>.tar`` with an image and a ``.cls`` a sample;
            - images: one sub-folder a class (in ``<split>/`` when there is such a folder of folders). A class is called
              as its folder, ``_`` read as a space, or as its line of ``classnames.txt`` says (sorted folders).

            Templates are optional in both (``templates.txt`` is read too); without, ``("{c}",)``.
        split: Which part of the set.

    Returns:
        The set; every label is valid and every template holds ``{c}``.

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
    if (part / "nshards.txt").is_file() or (part.is_dir() and any(is_tar(p) for p in part.iterdir())):
        return _open_shards(folder, split)
    others = sorted(p.parent.name for p in folder.glob("*/nshards.txt"))
    if others:
        raise InputError(f"{folder} has no split {split!r}; it has {', '.join(others)}")
    return _open_folders(folder, part if part.is_dir() and subfolders(part) else folder)


# CLIP_benchmark's layout


class _TarPictures:
    def __init__(self, reader: TarReader, keys: list[str], shards: list[int], places: list[Member]) -> None:
        self._reader = reader
        self._keys = tuple(keys)  # no Arrow array: making one imports pandas where it is installed (0.5 s)
        self._shards = np.array(shards, np.int32)
        self._places = np.array([(m.offset, m.size) for m in places], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, index: int) -> tuple[str, bytes]:
        shard = int(self._shards[index])
        offset, size = self._places[index].tolist()
        try:
            return self._keys[index], self._reader.read(shard, offset, size)
        except OSError as error:
            raise InputError(f"{self._reader.paths[shard]}: {error.strerror or error}") from None


def _open_shards(folder: Path, split: str) -> LabelledSet:
    classnames = _read_lines(folder / "classnames.txt")
    if classnames is None:
        raise InputError(f"{folder} has no classnames.txt (one class name a line, line number = label)")
    reader = TarReader(_shard_paths(folder / split))
    keys: list[str] = []
    shards: list[int] = []
    places: list[Member] = []
    labels: list[int] = []
    for number, path in enumerate(reader.paths):
        listing = reader.listing(number)
        if listing.cut is not None:
            raise InputError(f"{path} is truncated ({listing.cut}): a test set must be whole, get the file again")
        for key, (image, cls) in group_members(listing.members, (IMAGE_EXTENSIONS, ("cls",))).items():
            if image is None or cls is None:
                raise InputError(f"{path}: sample {key!r} has no {'image' if image is None else '.cls label'}")
            raw = reader.read(number, cls.offset, min(cls.size, _MOST_BYTES))
            labels.append(_label(raw, len(classnames), f"{path}: sample {key!r}"))
            keys.append(f"{path.name}/{key}")
            shards.append(number)
            places.append(image)
    if not labels:
        raise InputError(f"{folder / split} holds no samples (an image and a .cls each)")
    pictures = _TarPictures(reader, keys, shards, places)
    return LabelledSet(
        folder.name, classnames, _read_templates(folder, classnames), np.array(labels, np.int64), pictures
    )


def _shard_paths(part: Path) -> tuple[Path, ...]:
    counter = part / "nshards.txt"
    if not counter.is_file():
        found = sorted(path for path in part.iterdir() if is_tar(path))
        for path in found:
            if not path.is_file():
                raise InputError(f"{path} is no file, but a folder, a pipe or a device")
        return tuple(found)
    with counter.open("rb") as file:
        text = _text(file.read(_MOST_BYTES))
    if not _NUMBER.fullmatch(text) or int(text) < 1:
        raise InputError(f"{counter} holds {text[:40]!r}, expected the number of shards")
    paths = []
    for i in range(int(text)):
        path = part / f"{i}.tar"
        if not path.is_file():
            raise InputError(f"{path}: no such file, although {counter.name} counts {text} shards")
        paths.append(path)
    return tuple(paths)


def _label(raw: bytes, n_classes: int, where: str) -> int:
    text = _text(raw)
    if not _NUMBER.fullmatch(text):
        raise InputError(f"{where} has the label {text[:40]!r}, expected a number from 0 to {n_classes - 1}")
    if int(text) >= n_classes:
        raise InputError(
            f"{where} has the label {text}, but classnames.txt names {n_classes} classes (0 to {n_classes - 1})"
        )
    return int(text)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace").strip()


# One sub-folder a class


class FilePictures:
    """Pictures by their paths below a folder, which are their keys as well."""

    def __init__(self, root: Path, paths: list[str]) -> None:
        self._root = root
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[str, bytes]:
        """Key and encoded image; raises ``BadSample`` where the file cannot be read."""
        path = self._paths[index]
        key = printable(path)
        return key, read_image_file(self._root / path, key)


def _open_folders(folder: Path, root: Path) -> LabelledSet:
    names = [path.name for path in subfolders(root)]
    if names and set(names) <= _SPLITS:
        raise InputError(
            f"{root} holds splits ({first_of(names)}), not classes; give the folder of one, such as {root / names[-1]}"
        )
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
    return LabelledSet(
        folder.resolve().name,
        classnames,
        _read_templates(folder, classnames),
        np.array(labels, np.int64),
        FilePictures(root, paths),
    )


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted by name; by number where all names are whole numbers."""
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if all(p.name.isdecimal() for p in folders):
        folders.sort(key=lambda p: int(p.name))
    return folders


def _images_below(root: Path, name: str) -> list[str]:
    suffixes = tuple(f".{ext}" for ext in IMAGE_EXTENSIONS)
    members = [
        (Path(at).relative_to(root) / file).as_posix()
        for at, _, files in os.walk(root / name)
        for file in files
        if file.lower().endswith(suffixes) and not file.startswith(".")
    ]
    return sorted(members)


# Text files of both


def _read_lines(path: Path) -> tuple[str, ...] | None:
    """The lines of a file of names; None if there is no such file. An empty line among them is an error."""
    try:
        lines = read_at_most(path, _MOST_NAMES).decode("utf-8-sig").rstrip().splitlines()
    except FileNotFoundError:
        return None
    except TooLarge as error:
        raise InputError(f"{path}: {error.size:,} bytes are too many for a list of names") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not lines:
        raise InputError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f"{path}: line {number} is empty, and a line's number is its label")
        if len(line) > _MOST_LINE:
            raise InputError(f"{path}: line {number} has {len(line):,} characters, at most {_MOST_LINE:,} are read")
    return tuple(line.strip() for line in lines)


def _read_templates(folder: Path, classnames: Sequence[str]) -> tuple[str, ...]:
    for name in _TEMPLATE_FILES:
        templates: Sequence[str] | None = _read_lines(folder / name)
        if templates is None:
            continue
        for number, template in enumerate(templates, 1):
            if "{c}" not in template:
                raise InputError(f"{folder / name}: line {number} has no {{c}} for the class name: {template!r}")
            if template.count("{c}") > _MOST_PLACES:
                raise InputError(f"{folder / name}: line {number} has more than {_MOST_PLACES} {{c}}")
        prompts = len(classnames) * len(templates)
        characters = len(classnames) * sum(map(len, templates))
        characters += sum(map(len, classnames)) * sum(template.count("{c}") for template in templates)
        if prompts > _MOST_PROMPTS or characters > _MOST_CHARACTERS:
            raise InputError(
                f"{folder / name}: {len(templates):,} templates for {len(classnames):,} classes are {prompts:,} "
                f"prompts of {characters:,} characters; at most {_MOST_PROMPTS:,} and {_MOST_CHARACTERS:,} are made"
            )
        return tuple(templates)
    return DEFAULT_TEMPLATES
