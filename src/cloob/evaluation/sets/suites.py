"""Suites: names for many sets at once, the paper's eight sets among them.

Nothing is downloaded.

A set that is missing or broken does not stop the others.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cloob.data.shards.spec import is_tar, local_folder
from cloob.data.source import IMAGE_SUFFIXES
from cloob.errors import InputError, nearest, one_line, refuse, require
from cloob.evaluation.sets.pictures import (
    CaptionedSet,
    LabelledSet,
    check_type,
    open_captioned,
    open_labelled,
    read_file,
    subfolders,
)
from cloob.models.importing import import_open_clip

if TYPE_CHECKING:  # it brings torch
    from cloob.data.vectors import VectorPairs

PROMPTS = Path(__file__).parent / "prompts"
"""Class names and templates; see NOTICE.md there."""

LAYOUTS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "layouts.json").read_text(encoding="utf-8")
)
"""What to put under the root per set, and who reads it, in the order of the paper's
table.
"""


def open_paper_set(name: str, root: Path, split: str = "test") -> LabelledSet:
    """Opens one of ``LAYOUTS`` below the folder of all sets, with CLIP's class names
    and templates.

    ``test`` is ImageNet's validation set; ``train`` is, for Flowers102, its train and
    validation images, as CLIP had them, and for ImageNet V2 ImageNet's.
    """
    layout = LAYOUTS[name]
    try:
        classnames, templates = prompts_of(name)
        if "folders" in layout:
            samples = _class_folders(root / layout["folders"][split], len(classnames))
        elif "torchvision" in layout:
            samples = _torchvision(layout["torchvision"], root, split)
        else:
            label_of = {
                _letters(classname): label for label, classname in enumerate(classnames)
            }
            samples = (_birdsnap if name == "birdsnap" else _ucf101)(
                root / name, split, label_of
            )
        labels = np.array([label for _, label in samples], np.int64)
        if not samples or labels.min() < 0 or labels.max() >= len(classnames):
            raise ValueError(
                f"{len(samples)} pictures, with labels up to {labels.max(initial=0)}"
            )
    except (
        Exception
    ) as error:  # torchvision, scipy and the readers here raise all sorts
        why = one_line(error).partition(" You can use")[
            0
        ]  # download=True is no option here
        raise InputError(
            f"{name}: cannot be read under {root} ({why}); put there {layout['put']}"
        ) from error
    below = [Path(os.path.relpath(path, root)) for path, _ in samples]
    for (path, _), relative in zip(samples, below, strict=True):
        if relative.parts[:1] == (os.pardir,):  # a list may have come from anywhere
            raise InputError(
                f"{name}: its lists name {os.path.normpath(path)[:300]!r}, which is not"
                f" below {root}"
            )
    pictures = partial(read_file, root, [path.as_posix() for path in below])
    return LabelledSet(name, classnames, templates, labels, pictures)


def prompts_of(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names by label, and templates with ``{c}``, as CLIP used them for a set."""
    if name in ("imagenet", "imagenetv2"):
        library = import_open_clip()
        templates = (template("{c}") for template in library.OPENAI_IMAGENET_TEMPLATES)
        return tuple(library.IMAGENET_CLASSNAMES), tuple(templates)
    content = json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(content["classes"]), tuple(content["templates"])


def _class_folders(folder: Path, classes: int) -> list[tuple[Path, int]]:
    """The pictures in one folder a class; torchvision's own readers of such sets would
    unpack archives here.
    """
    folders = subfolders(folder)
    if len(folders) != classes:
        raise ValueError(
            f"{folder} has {len(folders)} class folders, {classes} would be right"
        )
    pictures = (
        sorted(
            path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES
        )
        for place in folders
    )
    return [(path, label) for label, paths in enumerate(pictures) for path in paths]


def _torchvision(kind: str, root: Path, split: str) -> list[tuple[Path, int]]:
    pictures: list[tuple[Any, Any]] = []
    for part in (
        ("train", "val") if (kind, split) == ("Flowers102", "train") else (split,)
    ):
        data: Any = getattr(require("torchvision.datasets", "train"), kind)(
            root, split=part, download=False
        )
        pictures += (
            zip(data._image_files, data._labels, strict=True)
            if kind == "Flowers102"
            else data._samples
        )
    return [(Path(path), int(label)) for path, label in pictures]


def _birdsnap(
    folder: Path, split: str, label_of: dict[str, int]
) -> list[tuple[Path, int]]:
    tables = []
    for name in ("species", "images", "test_images"):
        with (folder / f"{name}.txt").open(encoding="utf-8", newline="") as file:
            tables.append(
                list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            )
    species, images, tests = tables
    folder_of = {row["id"]: row["dir"] for row in species}
    test_paths = {row["path"] for row in tests}
    pictures = []
    for row in images:
        file_of_row = folder / "download" / "images" / row["path"]
        if (row["path"] in test_paths) == (split == "test") and file_of_row.is_file():
            pictures.append(
                (file_of_row, label_of[_letters(folder_of[row["species_id"]])])
            )
    return pictures


def _ucf101(
    folder: Path, split: str, label_of: dict[str, int]
) -> list[tuple[Path, int]]:
    pictures = []
    for line in (
        (folder / "ucfTrainTestlist" / f"{split}list01.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    ):
        if line.strip():
            video = Path(
                line.split()[0]
            )  # in a list of training videos the class's number follows
            frames = [
                (folder / "frames" / video).with_suffix(suffix)
                for suffix in IMAGE_SUFFIXES
            ]
            frame = next((path for path in frames if path.is_file()), frames[0])
            pictures.append((frame, label_of[_letters(video.parent.name)]))
    # A frame that is missing is counted as an unreadable picture.
    return pictures if any(path.is_file() for path, _ in pictures) else []


def _letters(text: str) -> str:
    """Letters and digits of a class name: ``ApplyEyeMakeup`` is ``Apply Eye
    Makeup``.
    """
    return "".join(c for c in text.casefold() if c.isalnum())


SUITES = ("paper", "pictograms", "vtab+")
"""The paper's eight sets under one root; every labelled set in a folder; every
CLIP_benchmark folder, three deep.
"""

_TRAINING = " (training)"
_MAX_DEPTH = 3


@dataclass
class SuiteSets:
    """``missing`` has the reason per missing set; ``"NAME (training)"``: its training
    images cannot be used.
    """

    sets: list[LabelledSet] = field(default_factory=list)
    training: dict[str, LabelledSet] = field(
        default_factory=dict
    )  # where it was requested
    pairs: list[CaptionedSet] = field(default_factory=list)  # for retrieval
    vectors: list[VectorPairs] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def training_failed(self) -> bool:
        return any(name.endswith(_TRAINING) for name in self.missing)


def open_suites(
    words: Sequence[str], root: Path | None = None, *, probe: bool = False
) -> SuiteSets:
    """Opens suites; ``words`` are names, each followed by its folder if that is not
    ``root``.
    """
    opened, members, rest = SuiteSets(), list[tuple[str, Path, bool]](), list(words)
    while rest:
        name = rest.pop(0)
        place = rest.pop(0) if rest and rest[0] not in SUITES else root
        if name not in SUITES or place is None:
            no_folder = (
                f"--suite {name}: no folder; write --suite {name} DIR, or --root DIR"
            )
            raise InputError(
                no_folder
                if name in SUITES
                else f"--suite: no suite {name!r}; {nearest(name, SUITES)}"
            )
        folder = local_folder(place, "the sets of a suite")
        if name == "paper":
            members += [(paper_set, folder, True) for paper_set in LAYOUTS]
            continue
        places = (
            subfolders(folder)
            if name == "pictograms"
            else _webdatasets(folder, _MAX_DEPTH)
        )
        expected = "folder" if name == "pictograms" else "test/nshards.txt"
        refuse({f"--suite {name}: {folder} holds no {expected}": not places})
        members += [
            (item.relative_to(folder).as_posix(), item, False) for item in places
        ]
    for name, folder, of_paper in members:
        failed = name
        try:
            if (
                not of_paper
                and check_type(folder, "classification", "retrieval") == "retrieval"
            ):
                opened.pairs.append(open_captioned(folder))
                continue
            data = open_paper_set(name, folder) if of_paper else open_labelled(folder)
            opened.sets.append(data)
            failed = name + _TRAINING
            if probe:
                training = (
                    open_paper_set(name, folder, "train")
                    if of_paper
                    else training_split(folder)
                )
                opened.training |= {} if training is None else {data.name: training}
        except (InputError, OSError) as error:
            opened.missing[failed] = str(error)
    return opened


def training_split(path: str | Path) -> LabelledSet | None:
    """The training images of a labelled set; None without such a split."""
    part = local_folder(path, "labelled pictures") / "train"
    inside = list(part.iterdir()) if part.is_dir() else None
    if inside is None or (
        inside
        and not any(p.is_dir() or is_tar(p) or p.name == "nshards.txt" for p in inside)
    ):
        return None  # pictures alone: a class of that name
    return open_labelled(path, "train")


def _webdatasets(folder: Path, depth: int) -> list[Path]:
    """Folders with ``test/nshards.txt``, by path; nothing is looked for inside of
    one.
    """
    places: list[Path] = []
    for path in subfolders(folder):
        if (path / "test" / "nshards.txt").is_file():
            places.append(path)
        elif depth > 1:
            places += _webdatasets(path, depth - 1)
    return places
