"""The paper's eight sets, each in the folders that its makers (or torchvision) give it. Nothing is downloaded."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cloob.data.source import IMAGE_SUFFIXES
from cloob.errors import InputError, one_line, require
from cloob.evaluation.sets.labelled import LabelledSet, read_file, subfolders
from cloob.models.importing import import_open_clip

PROMPTS = Path(__file__).parent / "prompts"
"""Class names and templates; see NOTICE.md there."""

Sample = tuple[Path, int]

LAYOUTS: Mapping[str, str] = {
    "birdsnap": "birdsnap/ with species.txt, images.txt, test_images.txt and download/images/ (get_birdsnap.py)",
    "country211": "country211/test/<ISO code>/*.jpg (country211.tgz of OpenAI, unpacked)",
    "flowers102": "flowers-102/ with jpg/, imagelabels.mat and setid.mat (102flowers.tgz of Oxford VGG, unpacked)",
    "gtsrb": "gtsrb/ with GTSRB/Final_Test/Images/*.ppm and GT-final_test.csv (GTSRB_Final_Test_*.zip, unpacked)",
    "ucf101": "ucf101/ with ucfTrainTestlist/ and the middle frame of each video, frames/<class>/<video>.jpg",
    "stanford_cars": "stanford_cars/ with cars_test/, cars_test_annos_withlabels.mat and devkit/",
    "imagenet": "imagenet/val/<wnid>/*.JPEG in 1000 folders (ILSVRC2012_img_val.tar sorted into classes)",
    "imagenetv2": "imagenetv2-matched-frequency-format-val/<0 … 999>/*.jpeg (its .tar.gz, unpacked)",
}
"""What to put under the root for each set, in the order of the paper's table."""


def open_paper_set(name: str, root: Path, split: str = "test") -> LabelledSet:
    """Opens one of ``LAYOUTS`` below the folder of all sets, with CLIP's class names and templates.

    ``test`` is ImageNet's validation set; ``train`` is, for Flowers102, its train and validation images, as CLIP had
    them, and for ImageNet V2 ImageNet's.

    Raises:
        InputError: The set is not there (the message says what to put where), or not what it should be.
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
    pictures = partial(read_file, root, [_below(name, root, path) for path, _ in samples])
    return LabelledSet(name, classnames, templates, labels, pictures)


def _below(name: str, root: Path, path: Path) -> str:
    """A picture's path below the root, without ``..``: its list may have come from anywhere."""
    below = Path(os.path.relpath(path, root))
    if below.parts[:1] == (os.pardir,):
        raise InputError(f"{name}: its lists name {os.path.normpath(path)[:300]!r}, which is not below {root}")
    return below.as_posix()


def prompts_of(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names by label, and templates with ``{c}``, as CLIP used them for a set."""
    if name in ("imagenet", "imagenetv2"):
        library = import_open_clip()
        templates = (template("{c}") for template in library.OPENAI_IMAGENET_TEMPLATES)
        return tuple(library.IMAGENET_CLASSNAMES), tuple(templates)
    content = json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(content["classes"]), tuple(content["templates"])


def _torchvision(kind: str, root: Path, split: str) -> list[Sample]:
    """The list of files and labels that a data set of torchvision holds."""
    data: Any = getattr(require("torchvision.datasets", "train"), kind)(root, split=split, download=False)
    samples = zip(data._image_files, data._labels, strict=True) if kind == "Flowers102" else data._samples
    return [(Path(path), int(label)) for path, label in samples]


def _flowers102(root: Path, split: str) -> list[Sample]:
    parts = ("train", "val") if split == "train" else ("test",)
    return [sample for part in parts for sample in _torchvision("Flowers102", root, part)]


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
    "flowers102": _flowers102,
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
    """A table with tabs, by the names of its columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _labels_by_name(name: str) -> dict[str, int]:
    """Labels by class name, of which only letters and digits count: ``ApplyEyeMakeup`` is ``Apply Eye Makeup``."""
    return {_letters(classname): label for label, classname in enumerate(prompts_of(name)[0])}


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())
