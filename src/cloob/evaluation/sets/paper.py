"""The paper's eight sets, each in the folders that its makers (or torchvision) give it. Nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cloob.data.source import IMAGE_EXTENSIONS
from cloob.errors import InputError, one_line, require
from cloob.evaluation.sets.labelled import FilePictures, LabelledSet, subfolders
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
    except InputError:
        raise
    except Exception as error:  # torchvision, scipy and the readers here raise all sorts for a list that is damaged
        raise InputError(f"{name}: its lists cannot be read ({one_line(error)}); {LAYOUTS[name]} is wanted") from error
    if not samples:
        raise _missing(name, root, "no picture found")
    classnames, templates = prompts_of(name)
    labels = np.array([label for _, label in samples], np.int64)
    if labels.min() < 0 or labels.max() >= len(classnames):
        wanted = f"0 to {len(classnames) - 1} would be right"
        raise InputError(f"{name}: labels from {labels.min()} to {labels.max()} found, {wanted}")
    pictures = FilePictures(root, [_below(name, root, path) for path, _ in samples])
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


def _torchvision(name: str, kind: str, root: Path, split: str) -> Any:
    """A dataset object of torchvision, which holds the list of files and labels."""
    datasets = require("torchvision.datasets", "train")
    try:
        return getattr(datasets, kind)(root, split=split, download=False)
    except (RuntimeError, FileNotFoundError) as error:
        error_line = _first_line(error).partition(" You can use")[0].rstrip(".")  # download=True is no option here
        raise _missing(name, root, error_line) from error


def _country211(root: Path, split: str) -> list[Sample]:
    return _class_folders("country211", root, root / "country211" / split, 211)


def _flowers102(root: Path, split: str) -> list[Sample]:
    parts = ("train", "val") if split == "train" else ("test",)
    splits = [_torchvision("flowers102", "Flowers102", root, part) for part in parts]
    return [pair for data in splits for pair in zip(data._image_files, data._labels, strict=True)]


def _gtsrb(root: Path, split: str) -> list[Sample]:
    data = _torchvision("gtsrb", "GTSRB", root, split)
    return [(Path(path), label) for path, label in data._samples]


def _stanford_cars(root: Path, split: str) -> list[Sample]:
    data = _torchvision("stanford_cars", "StanfordCars", root, split)
    return [(Path(path), int(label)) for path, label in data._samples]


def _imagenet(root: Path, split: str) -> list[Sample]:
    return _class_folders("imagenet", root, root / "imagenet" / ("val" if split == "test" else split), 1000)


def _imagenetv2(root: Path, split: str) -> list[Sample]:
    if split != "test":
        return _imagenet(root, split)
    return _class_folders("imagenetv2", root, root / "imagenetv2-matched-frequency-format-val", 1000)


def _birdsnap(root: Path, split: str) -> list[Sample]:
    folder = root / "birdsnap"
    label_of = _labels_by_name("birdsnap")
    tables = {name: _lines("birdsnap", root, folder / f"{name}.txt") for name in ("species", "images", "test_images")}
    header, *species = (line.split("\t") for line in tables["species"])
    folder_of = {row[header.index("id")]: row[header.index("dir")] for row in species}
    tests = {line.split("\t")[0] for line in tables["test_images"][1:]}
    header, *images = (line.split("\t") for line in tables["images"])
    pictures = []
    for row in images:
        path = row[header.index("path")]
        file = folder / "download" / "images" / path
        if (path in tests) == (split == "test") and file.is_file():
            name = folder_of[row[header.index("species_id")]]
            pictures.append((file, _label("birdsnap", label_of, name)))
    return pictures


def _ucf101(root: Path, split: str) -> list[Sample]:
    folder = root / "ucf101"
    lists = folder / "ucfTrainTestlist"
    label_of = _labels_by_name("ucf101")
    pictures = []
    for line in _lines("ucf101", root, lists / f"{split}list01.txt"):
        video = Path(line.split()[0])  # a list of training videos has the class's number behind
        frames = [(folder / "frames" / video).with_suffix(f".{ext}") for ext in IMAGE_EXTENSIONS]
        frame = next((path for path in frames if path.is_file()), frames[0])
        pictures.append((frame, _label("ucf101", label_of, video.parent.name)))
    if not any(path.is_file() for path, _ in pictures):
        raise _missing("ucf101", root, f"no frame in {folder / 'frames'}")
    return pictures  # a frame that is missing is counted as an unreadable picture


_READERS: Mapping[str, Callable[[Path, str], list[Sample]]] = {
    "birdsnap": _birdsnap,
    "country211": _country211,
    "flowers102": _flowers102,
    "gtsrb": _gtsrb,
    "ucf101": _ucf101,
    "stanford_cars": _stanford_cars,
    "imagenet": _imagenet,
    "imagenetv2": _imagenetv2,
}


def _missing(name: str, root: Path, reason: str) -> InputError:
    return InputError(f"{name}: not found under {root} ({reason}); put there {LAYOUTS[name]}")


def _class_folders(name: str, root: Path, folder: Path, classes: int) -> list[Sample]:
    """The pictures in one folder a class; torchvision's own readers of such sets would unpack archives here."""
    if not folder.is_dir():
        raise _missing(name, root, f"no folder {folder}")
    folders = subfolders(folder)
    if len(folders) != classes:
        raise InputError(f"{name}: {folder} has {len(folders)} class folders, {classes} would be right")
    suffixes = {f".{ext}" for ext in IMAGE_EXTENSIONS}
    pictures = (sorted(path for path in place.iterdir() if path.suffix.lower() in suffixes) for place in folders)
    return [(path, label) for label, paths in enumerate(pictures) for path in paths]


def _lines(name: str, root: Path, path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise _missing(name, root, f"no file {path}") from None
    return [line for line in lines if line.strip()]


def _labels_by_name(name: str) -> dict[str, int]:
    """Labels by class name, of which only letters and digits count: ``ApplyEyeMakeup`` is ``Apply Eye Makeup``."""
    return {_letters(classname): label for label, classname in enumerate(prompts_of(name)[0])}


def _label(name: str, label_of: Mapping[str, int], folder: str) -> int:
    if _letters(folder) not in label_of:
        raise InputError(f"{name}: {folder!r} is none of its {len(label_of)} classes")
    return label_of[_letters(folder)]


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
