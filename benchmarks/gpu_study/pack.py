"""The pictograms in one file that is small enough to carry: the encoded pictures as they are, without a byte changed.

A tar spends a header and padding on each picture and each caption; here the pictures of a set lie one after the other.
The file is a ZIP: of each set ``NAME/pictures`` (their bytes), ``NAME/facts.json`` (where each ends, and its captions
or labels). Training and held-out pairs are always in it; of the test sets those that fit.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloob.data.open import open_source
from cloob.errors import InputError
from cloob.evaluate.sets.labelled import open_labelled

MOST_BYTES = 55 * 2**20
PAIRS = {"train": "pictograms/train", "val": "pictograms/val"}
TESTS = (
    "noto-emoji",
    "twemoji-activities",
    "fluent3d-emoji",
    "animal-silhouettes",
    "flags",
    "digits",
    "tuxpaint-photos",
)
"""In the order in which they are taken."""


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures of a set, and what is known of them.

    Attributes:
        files: n encoded pictures.
        facts: ``captions`` of pairs; ``labels``, ``classnames`` and ``templates`` of a test set.
    """

    files: list[bytes]
    facts: dict[str, Any] = field(default_factory=dict)


def build(data: Path, target: Path) -> dict[str, int]:
    """Writes the pack.

    Args:
        data: The folder of the pictograms, see its README.
        target: The file.

    Returns:
        Pictures of each set that is in it.

    Raises:
        InputError: A set is not there, or the pairs alone are too large.
    """
    counts: dict[str, int] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w") as archive:
        for name, place in PAIRS.items():
            source = open_source(data / place)
            samples = [source.read(i) for i in range(len(source))]
            facts = {"captions": [sample.caption for sample in samples]}
            _add(archive, name, Pictures([sample.image for sample in samples], facts))
            counts[name] = len(samples)
        for name in TESTS:
            found = open_labelled(data / "zeroshot" / name, "test")
            files = [found.read(i)[1] for i in range(len(found))]
            if _size(archive) + sum(map(len, files)) > MOST_BYTES - 2**19:
                continue  # a smaller one may still fit
            words = {"classnames": list(found.classnames), "templates": list(found.templates)}
            _add(archive, name, Pictures(files, {"labels": found.labels.tolist(), **words}))
            counts[name] = len(files)
    if target.stat().st_size > MOST_BYTES:
        raise InputError(f"{target}: {target.stat().st_size / 2**20:.1f} MiB, where {MOST_BYTES >> 20} are allowed")
    return counts


def _size(archive: zipfile.ZipFile) -> int:
    return sum(info.compress_size for info in archive.infolist())


def _add(archive: zipfile.ZipFile, name: str, pictures: Pictures) -> None:
    ends = list(itertools.accumulate(map(len, pictures.files)))
    archive.writestr(f"{name}/pictures", b"".join(pictures.files))  # WebP does not get smaller
    text = json.dumps({"ends": ends, **pictures.facts}, ensure_ascii=False)
    archive.writestr(f"{name}/facts.json", text, zipfile.ZIP_DEFLATED)


def read(path: Path) -> dict[str, Pictures]:
    """All sets of a pack by their names.

    Raises:
        InputError: It is no such file.
    """
    sets: dict[str, Pictures] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted({entry.rpartition("/")[0] for entry in archive.namelist()}):
                facts = json.loads(archive.read(f"{name}/facts.json"))
                content, ends = archive.read(f"{name}/pictures"), facts.pop("ends")
                starts = [0, *ends[:-1]]
                files = [content[start:end] for start, end in zip(starts, ends, strict=True)]
                sets[name] = Pictures(files, facts)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no pack of pictures ({error}); `build` makes one") from None
    return sets
