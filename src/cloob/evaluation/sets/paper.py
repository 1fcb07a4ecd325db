"""The paper's eight labelled sets under one folder.

Nothing is downloaded. A set that is missing or broken does not stop the others.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from cloob.data.shards.spec import is_tar, local_folder
from cloob.data.source import IMAGE_SUFFIXES
from cloob.errors import InputError, one_line, require
from cloob.evaluation.sets.pictures import (
    CaptionedSet,
    LabelledSet,
    labelled_folder,
    open_labelled,
    read_picture,
    subfolders,
)
from cloob.models.importing import import_open_clip

if TYPE_CHECKING:  # it brings torch
    from cloob.data.vectors import VectorPairs

PROMPTS = Path(__file__).parent / "prompts"
"""Class names and templates; see NOTICE.md there."""


class Layout(TypedDict):
    """Where a set lies under the root, and what reads it."""

    put: str  # what to put there
    folders: NotRequired[dict[str, str]]  # by split, where it has a folder a class
    torchvision: NotRequired[str]  # its class there


LAYOUTS: dict[str, Layout] = json.loads(
    Path(__file__).with_name("layouts.json").read_text(encoding="utf-8")
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
    try:
        classnames, templates = prompts_of(name)
        samples = _paper_samples(name, root, split, classnames)
        labels = np.array([label for _, label in samples], np.int64)
        if not samples or labels.min() < 0 or labels.max() >= len(classnames):
            raise ValueError(
                f"{len(samples)} pictures, with labels up to {labels.max(initial=0)}"
            )
    except Exception as error:  # torchvision, scipy and we raise all sorts
        # download=True is no option here
        why = one_line(error).partition(" You can use")[0]
        raise InputError(
            f"{name}: cannot be read under {root} ({why}); put there"
            f" {LAYOUTS[name]['put']}"
        ) from error
    files = []
    for path, _ in samples:
        file = Path(os.path.relpath(path, root))
        if file.parts[:1] == (os.pardir,):  # a list may have come from anywhere
            raise InputError(
                f"{name}: its lists name {os.path.normpath(path)[:300]!r}, which is not"
                f" below {root}"
            )
        files.append(file.as_posix())
    read = partial(read_picture, root, files)
    return LabelledSet(name, classnames, templates, labels, read)


def _paper_samples(
    name: str, root: Path, split: str, classnames: Sequence[str]
) -> list[tuple[Path, int]]:
    """The files of a set with their labels."""
    layout = LAYOUTS[name]
    if "folders" in layout:
        return _class_folders(root / layout["folders"][split], len(classnames))
    if "torchvision" in layout:
        return _torchvision(layout["torchvision"], root, split)
    label_of = {_letters(each): label for label, each in enumerate(classnames)}
    read = _birdsnap if name == "birdsnap" else _ucf101
    return read(root / name, split, label_of)


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
    pictures: list[tuple[Path, int]] = []
    for label, place in enumerate(folders):
        files = sorted(place.iterdir())
        pictures += [(f, label) for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
    return pictures


def _torchvision(kind: str, root: Path, split: str) -> list[tuple[Path, int]]:
    """The pictures and labels of a data set as torchvision's reader lists them."""
    datasets = require("torchvision.datasets", "train")
    reader = getattr(datasets, kind)
    if kind != "Flowers102":
        samples = reader(root, split=split, download=False)._samples
        return [(Path(path), int(label)) for path, label in samples]
    pictures: list[tuple[Path, int]] = []
    for part in ("train", "val") if split == "train" else (split,):
        data = reader(root, split=part, download=False)
        labels = map(int, data._labels)
        pictures += zip(map(Path, data._image_files), labels, strict=True)
    return pictures


def _birdsnap(
    folder: Path, split: str, label_of: dict[str, int]
) -> list[tuple[Path, int]]:
    """The pictures and labels of a split of Birdsnap."""
    label_of_species = {
        row["id"]: label_of[_letters(row["dir"])]
        for row in _tab_rows(folder / "species.txt")
    }
    tests = {row["path"] for row in _tab_rows(folder / "test_images.txt")}
    pictures = []
    for row in _tab_rows(folder / "images.txt"):
        path = folder / "download" / "images" / row["path"]
        if (row["path"] in tests) == (split == "test") and path.is_file():
            pictures.append((path, label_of_species[row["species_id"]]))
    return pictures


def _tab_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _ucf101(
    folder: Path, split: str, label_of: dict[str, int]
) -> list[tuple[Path, int]]:
    """The frames and labels of a split of UCF101's videos, one frame each."""
    listed = folder / "ucfTrainTestlist" / f"{split}list01.txt"
    pictures = []
    for line in listed.read_text(encoding="utf-8").splitlines():
        if line.strip():
            # in a list of training videos the class's number follows
            video = Path(line.split()[0])
            frame = _frame_of(folder / "frames" / video)
            pictures.append((frame, label_of[_letters(video.parent.name)]))
    # A frame that is missing is counted as an unreadable picture.
    return pictures if any(path.is_file() for path, _ in pictures) else []


def _frame_of(video: Path) -> Path:
    frames = [video.with_suffix(suffix) for suffix in IMAGE_SUFFIXES]
    return next((path for path in frames if path.is_file()), frames[0])


def _letters(text: str) -> str:
    """Letters and digits of a class name: ``ApplyEyeMakeup`` is ``Apply Eye
    Makeup``.
    """
    return "".join(c for c in text.casefold() if c.isalnum())


@dataclass
class Sets:
    """What models are measured on.

    ``missing`` has the reason per missing set; ``"NAME (training)"``: its training
    images cannot be used.
    """

    sets: list[LabelledSet] = field(default_factory=list)
    # where it was requested
    training: dict[str, LabelledSet] = field(default_factory=dict)
    pairs: list[CaptionedSet] = field(default_factory=list)  # for retrieval
    vectors: list[VectorPairs] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def open_paper(opened: Sets, root: Path, *, probe: bool = False) -> None:
    """Adds the paper's eight sets below a folder, and for probes their training images;
    or notes why one cannot be used.
    """
    folder = local_folder(root, "the paper's sets")
    for name in LAYOUTS:
        part = name
        try:
            opened.sets.append(open_paper_set(name, folder))
            part = f"{name} (training)"
            if probe:
                opened.training[name] = open_paper_set(name, folder, "train")
        except (InputError, OSError) as error:
            opened.missing[part] = str(error)


def training_split(path: str | Path) -> LabelledSet | None:
    """The training images of a labelled set; None without such a split."""
    part = labelled_folder(path) / "train"
    if not part.is_dir():
        return None
    inside = list(part.iterdir())
    holds_split = any(
        each.is_dir() or is_tar(each) or each.name == "nshards.txt" for each in inside
    )
    if inside and not holds_split:  # pictures alone: a class of that name
        return None
    return open_labelled(path, "train")
