"""Suites: names for many sets at once, the paper's eight sets among them. Nothing is downloaded.

A set that is missing or broken does not stop the others.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cloob.data.shards.spec import is_tar, local_folder
from cloob.data.source import IMAGE_SUFFIXES
from cloob.errors import InputError, nearest, one_line, require
from cloob.evaluation.sets.captioned import CaptionedSet, check_type, open_captioned
from cloob.evaluation.sets.labelled import LabelledSet, open_labelled, read_file, subfolders
from cloob.models.importing import import_open_clip

if TYPE_CHECKING:  # it brings torch
    from cloob.data.vectors import VectorPairs

PROMPTS = Path(__file__).parent / "prompts"
"""Class names and templates; see NOTICE.md there."""

Sample = tuple[Path, int]

LAYOUTS: dict[str, str] = json.loads((Path(__file__).parent / "layouts.json").read_text(encoding="utf-8"))
"""What to put under the root per set, in the order of the paper's table."""


def open_paper_set(name: str, root: Path, split: str = "test") -> LabelledSet:
    """Opens one of ``LAYOUTS`` below the folder of all sets, with CLIP's class names and templates.

    ``test`` is ImageNet's validation set; ``train`` is, for Flowers102, its train and validation images, as CLIP had
    them, and for ImageNet V2 ImageNet's.
    """
    try:
        samples = _READERS[name](root, split)
        classnames, templates = prompts_of(name)
        labels = np.array([label for _, label in samples], np.int64)
        if not samples or labels.min() < 0 or labels.max() >= len(classnames):
            raise ValueError(f"{len(samples)} pictures, with labels up to {labels.max(initial=0)}")
    except Exception as error:  # torchvision, scipy and the readers here raise all sorts
        why = one_line(error).partition(" You can use")[0]  # download=True is no option here
        raise InputError(f"{name}: cannot be read under {root} ({why}); put there {LAYOUTS[name]}") from error
    below = [Path(os.path.relpath(path, root)) for path, _ in samples]
    for (path, _), relative in zip(samples, below, strict=True):
        if relative.parts[:1] == (os.pardir,):  # a list may have come from anywhere
            raise InputError(f"{name}: its lists name {os.path.normpath(path)[:300]!r}, which is not below {root}")
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


def _torchvision(kind: str, root: Path, split: str) -> list[Sample]:
    pictures: list[tuple[Any, Any]] = []
    for part in ("train", "val") if (kind, split) == ("Flowers102", "train") else (split,):
        data: Any = getattr(require("torchvision.datasets", "train"), kind)(root, split=part, download=False)
        pictures += zip(data._image_files, data._labels, strict=True) if kind == "Flowers102" else data._samples
    return [(Path(path), int(label)) for path, label in pictures]


def _imagenet(root: Path, split: str) -> list[Sample]:
    return _class_folders(root / "imagenet" / ("val" if split == "test" else split), 1000)


def _imagenetv2(root: Path, split: str) -> list[Sample]:
    folder = root / "imagenetv2-matched-frequency-format-val"
    return _class_folders(folder, 1000) if split == "test" else _imagenet(root, split)


def _birdsnap(root: Path, split: str) -> list[Sample]:
    folder = root / "birdsnap"
    label_of = _labels_by_name("birdsnap")
    species, images, tests = (_table(folder / f"{name}.txt") for name in ("species", "images", "test_images"))
    folder_of = {row["id"]: row["dir"] for row in species}
    test_paths = {row["path"] for row in tests}
    pictures = []
    for row in images:
        file = folder / "download" / "images" / row["path"]
        if (row["path"] in test_paths) == (split == "test") and file.is_file():
            pictures.append((file, label_of[_letters(folder_of[row["species_id"]])]))
    return pictures


def _ucf101(root: Path, split: str) -> list[Sample]:
    folder = root / "ucf101"
    label_of = _labels_by_name("ucf101")
    pictures = []
    for line in (folder / "ucfTrainTestlist" / f"{split}list01.txt").read_text(encoding="utf-8").splitlines():
        if line.strip():
            video = Path(line.split()[0])  # a list of training videos has the class's number behind
            frames = [(folder / "frames" / video).with_suffix(suffix) for suffix in IMAGE_SUFFIXES]
            frame = next((path for path in frames if path.is_file()), frames[0])
            pictures.append((frame, label_of[_letters(video.parent.name)]))
    # A frame that is missing is counted as an unreadable picture.
    return pictures if any(path.is_file() for path, _ in pictures) else []


_READERS: Mapping[str, Callable[[Path, str], list[Sample]]] = {
    "birdsnap": _birdsnap,
    "country211": lambda root, split: _class_folders(root / "country211" / split, 211),
    "flowers102": partial(_torchvision, "Flowers102"),
    "gtsrb": partial(_torchvision, "GTSRB"),
    "ucf101": _ucf101,
    "stanford_cars": partial(_torchvision, "StanfordCars"),
    "imagenet": _imagenet,
    "imagenetv2": _imagenetv2,
}


def _class_folders(folder: Path, classes: int) -> list[Sample]:
    """The pictures in one folder a class; torchvision's own readers of such sets would unpack archives here."""
    folders = subfolders(folder)
    if len(folders) != classes:
        raise ValueError(f"{folder} has {len(folders)} class folders, {classes} would be right")
    pictures = (sorted(path for path in place.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES) for place in folders)
    return [(path, label) for label, paths in enumerate(pictures) for path in paths]


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _labels_by_name(name: str) -> dict[str, int]:
    """Labels by class name, of which only letters and digits count: ``ApplyEyeMakeup`` is ``Apply Eye Makeup``."""
    return {_letters(classname): label for label, classname in enumerate(prompts_of(name)[0])}


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


SUITES = ("paper", "pictograms", "vtab+")
"""The paper's eight sets under one root; every labelled set in a folder; every CLIP_benchmark folder, three deep."""

_TRAINING = " (training)"
_MAX_DEPTH = 3


@dataclass
class SuiteSets:
    """``missing`` says why a set is not there; ``"NAME (training)"``: its training images cannot be used."""

    sets: list[LabelledSet] = field(default_factory=list)
    training: dict[str, LabelledSet] = field(default_factory=dict)  # where it was asked for
    pairs: list[CaptionedSet] = field(default_factory=list)  # for retrieval
    vectors: list[VectorPairs] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def training_failed(self) -> bool:
        return any(name.endswith(_TRAINING) for name in self.missing)

    def add(
        self,
        name: str,
        test: Callable[[], LabelledSet | CaptionedSet],
        train: Callable[[], LabelledSet | None] | None,
    ) -> None:
        failed = name
        try:
            data = test()
            if isinstance(data, CaptionedSet):
                self.pairs.append(data)
                return
            self.sets.append(data)
            failed = name + _TRAINING
            if train is not None and (training := train()) is not None:
                self.training[data.name] = training
        except (InputError, OSError) as error:
            self.missing[failed] = str(error)


def open_suites(words: Sequence[str], root: Path | None = None, *, probe: bool = False) -> SuiteSets:
    """Opens suites; ``words`` are names, each followed by its folder if that is not ``root``."""
    opened = SuiteSets()
    rest = list(words)
    while rest:
        name = rest.pop(0)
        named = rest.pop(0) if rest and rest[0] not in SUITES else root
        if name not in SUITES or named is None:
            no_folder = f"--suite {name}: no folder; write --suite {name} DIR, or --root DIR"
            raise InputError(no_folder if name in SUITES else f"--suite: no suite {name!r}; {nearest(name, SUITES)}")
        folder = local_folder(named, "the sets of a suite")
        if name == "paper":
            for paper_set in LAYOUTS:
                test, training = (partial(open_paper_set, paper_set, folder, split) for split in ("test", "train"))
                opened.add(paper_set, test, training if probe else None)
            continue
        places = subfolders(folder) if name == "pictograms" else _webdatasets(folder, _MAX_DEPTH)
        if not places:
            expected = "folder" if name == "pictograms" else "test/nshards.txt"
            raise InputError(f"--suite {name}: {folder} holds no {expected}")
        for place in places:
            train = partial(training_split, place) if probe else None
            opened.add(place.relative_to(folder).as_posix(), partial(_open_folder, place), train)
    return opened


def training_split(path: str | Path) -> LabelledSet | None:
    """The training images of a labelled set; None without such a split."""
    part = local_folder(path, "labelled pictures") / "train"
    inside = list(part.iterdir()) if part.is_dir() else None
    if inside is None or (inside and not any(p.is_dir() or is_tar(p) or p.name == "nshards.txt" for p in inside)):
        return None  # pictures alone: a class of that name
    return open_labelled(path, "train")


def _open_folder(folder: Path) -> LabelledSet | CaptionedSet:
    retrieval = check_type(folder, "classification", "retrieval") == "retrieval"
    return open_captioned(folder) if retrieval else open_labelled(folder)


def _webdatasets(folder: Path, depth: int) -> list[Path]:
    """Folders with ``test/nshards.txt``, by path; nothing is looked for inside of one."""
    places: list[Path] = []
    for path in subfolders(folder):
        if (path / "test" / "nshards.txt").is_file():
            places.append(path)
        elif depth > 1:
            places += _webdatasets(path, depth - 1)
    return places
