"""Labelled pictures for zero-shot classification: CLIP_benchmark's WebDataset folders, and plain image folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cloob.data.batch import printable, read_image_file
from cloob.data.open import DEMO
from cloob.data.shards.spec import is_tar, local_folder
from cloob.data.shards.tar import TarReader, group_members
from cloob.data.source import IMAGE_EXTENSIONS, IMAGE_SUFFIXES
from cloob.data.sources.paths import walk
from cloob.errors import InputError, first_of

_SPLITS = {"train", "val", "valid", "validation", "test"}
_TEMPLATE_FILES = ("zeroshot_classification_templates.txt", "templates.txt")
_MAX_LABEL_BYTES = 1 << 10


@dataclass(frozen=True)
class LabelledSet:
    """Pictures with a class each, and the words for the classes."""

    name: str
    classnames: tuple[str, ...]  # a label is an index into it
    templates: tuple[str, ...]  # ``{c}`` stands for the class name; fill in with ``str.replace``: names may hold braces
    labels: np.ndarray  # (n,) int64
    pictures: Callable[[int], tuple[str, bytes]]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[str, bytes]:
        """Key and encoded image; ``BadSample`` if it cannot be read: it stays in the set and counts as wrong."""
        return self.pictures(index)


def open_labelled(path: str | Path, split: str = "test") -> LabelledSet:
    """Opens a labelled set: ``"demo:noto-emoji"`` (inside the package), or a folder in one of two layouts.

    - CLIP_benchmark's: ``classnames.txt`` (line number = label), ``zeroshot_classification_templates.txt``,
      ``<split>/nshards.txt``, ``<split>/<i>.tar`` with an image and a ``.cls`` a sample;
    - images: one sub-folder a class (in ``<split>/`` if that is a folder of folders). A class is called as its folder,
      ``_`` read as a space, or as its line of ``classnames.txt`` says. Templates are optional in both.
    """
    folder = local_folder(DEMO / "noto-emoji" if str(path) == "demo:noto-emoji" else path, "labelled pictures")
    part = folder / split
    classnames = _read_lines(folder / "classnames.txt")
    if part.is_dir() and any(is_tar(file) or file.name == "nshards.txt" for file in part.iterdir()):
        name, opened = folder.name, _open_shards(folder, part, classnames)
    elif others := sorted(file.parent.name for file in folder.glob("*/nshards.txt")):
        raise InputError(f"{folder} has no split {split!r}; it has {', '.join(others)}")
    else:
        root = part if part.is_dir() and subfolders(part) else folder
        name, opened = folder.resolve().name, _open_folders(folder, root, classnames)
    classes, labels, pictures = opened
    templates = next(filter(None, (_read_lines(folder / item, "{c}") for item in _TEMPLATE_FILES)), ("{c}",))
    return LabelledSet(name, classes, templates, np.array(labels, np.int64), pictures)


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted by name; by number if all names are whole numbers."""
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if all(p.name.isdecimal() for p in folders):
        folders.sort(key=lambda p: int(p.name))
    return folders


def read_file(root: Path, paths: Sequence[str], index: int) -> tuple[str, bytes]:
    key = printable(paths[index])
    return key, read_image_file(root / paths[index], key)


_Opened = tuple[tuple[str, ...], list[int], Callable[[int], tuple[str, bytes]]]
"""Names of classes, labels and pictures."""


def _open_shards(folder: Path, part: Path, classnames: tuple[str, ...] | None) -> _Opened:
    counter = part / "nshards.txt"
    count = counter.read_text(encoding="utf-8", errors="replace").strip() if counter.is_file() else ""
    if classnames is None or (count and not count.isdecimal()):
        no_names = f"{folder} has no classnames.txt (one class name a line, line number = label)"
        raise InputError(f"{counter}: {count[:40]!r} is no number of shards" if classnames else no_names)
    paths = [part / f"{i}.tar" for i in range(int(count))] if count else sorted(filter(is_tar, part.iterdir()))
    reader = TarReader(tuple(paths))
    places: list[tuple[str, int, int, int]] = []
    labels: list[int] = []
    wrong: list[str] = []
    for shard, path in enumerate(paths):
        members, cut = reader.listing(shard)
        if cut:
            wrong.append(f"{path} is truncated ({cut}): a test set must be whole, get the file again")
        for key, (image, cls) in group_members(members, (IMAGE_EXTENSIONS, ("cls",)))[0].items():
            label = reader.read(shard, cls.offset, min(cls.size, _MAX_LABEL_BYTES)).strip() if cls else b""
            if image is not None and label.isdigit() and int(label) < len(classnames):
                labels.append(int(label))
                places.append((f"{path.name}/{key}", shard, image.offset, image.size))
            else:
                expected = f"an image and a .cls from 0 to {len(classnames) - 1}, a line of classnames.txt"
                wrong.append(f"{path}: sample {key!r}: {expected} is expected")
    if wrong or not labels:
        raise InputError(wrong[0] if wrong else f"{part} holds no samples (an image and a .cls each)")
    return classnames, labels, lambda index: (places[index][0], reader.read(*places[index][1:]))


def _open_folders(folder: Path, root: Path, classnames: tuple[str, ...] | None) -> _Opened:
    names = [path.name for path in subfolders(root)]
    images = []
    for name in names:
        files = ((Path(at).relative_to(root) / file).as_posix() for at, _, files in walk(root / name) for file in files)
        images.append(sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES)))
    wrong = ""
    if not names or set(names) <= _SPLITS:
        holds = f"holds splits ({first_of(names)}); give the folder of one" if names else "has no sub-folder"
        wrong = f"{root} {holds}: expected one a class, or classnames.txt and <split>/<i>.tar shards"
    elif len(classnames or names) != len(names):
        said = f"{folder / 'classnames.txt'} names {len(classnames or ())} classes"
        wrong = f"{said}, but {root} has {len(names)} sub-folders"
    elif [] in images:
        wrong = f"{root / names[images.index([])]}: no image in this class folder"
    if wrong:
        raise InputError(wrong)
    labels = [label for label, paths in enumerate(images) for _ in paths]
    classes = classnames or tuple(printable(name).replace("_", " ") for name in names)
    return classes, labels, partial(read_file, root, [path for paths in images for path in paths])


def _read_lines(path: Path, wanted: str = "") -> tuple[str, ...] | None:
    """The lines of a file, none of them empty or without ``wanted``; None if there is no such file."""
    if not path.exists():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines() or [""]
        bad = next((i for i, line in enumerate(lines, 1) if not line.strip() or wanted not in line), 0)
        wrong = f"line {bad} is empty or has no {wanted or 'name of a class'}: {lines[bad - 1]!r}" if bad else ""
    except (OSError, UnicodeDecodeError) as error:
        wrong = f"cannot be read: {error}"
    if wrong:
        raise InputError(f"{path}: {wrong}")
    return tuple(line.strip() for line in lines)
