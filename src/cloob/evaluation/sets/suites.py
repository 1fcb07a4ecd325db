"""Suites: names for many sets at once. A set that is not there, or not right, does not stop the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloob.data.content import Reader
from cloob.data.shards.spec import local_folder
from cloob.data.shards.tar import is_tar
from cloob.errors import InputError, nearest
from cloob.evaluation.sets.captioned import open_captioned
from cloob.evaluation.sets.labelled import LabelledSet, open_labelled, subfolders
from cloob.evaluation.sets.paper import LAYOUTS, open_paper_set

SUITES = {
    "paper": "the paper's eight sets, under one root",
    "pictograms": "every labelled set in a folder, each in a folder of its own",
    "vtab+": "every CLIP_benchmark WebDataset folder in a folder, up to three deep",
}

_TRAIN_SPLIT = "train"
_TRAINING = " (training)"
_DEEPEST = 3


@dataclass
class SuiteSets:
    """What a suite came to.

    Attributes:
        sets: Labelled sets to classify.
        training: Set name -> its training images, where there are such and they were asked for.
        pairs: Sets for retrieval, which CLIP_benchmark's folders may be as well.
        missing: Set name -> why it is not among them; one line. ``"NAME (training)"`` is a set that is among them, but
            whose training images cannot be used.
    """

    sets: list[LabelledSet] = field(default_factory=list)
    training: dict[str, LabelledSet] = field(default_factory=dict)
    pairs: list[Reader] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def training_failed(self) -> bool:
        """Whether there are training images that cannot be used."""
        return any(name.endswith(_TRAINING) for name in self.missing)


def open_suites(words: Sequence[str], root: Path | None = None, *, probe: bool = False) -> SuiteSets:
    """Opens suites.

    Args:
        words: Names of suites, each followed by its folder if that is not ``root``: ``("paper", "/data")``.
        root: Folder of the suites that have none of their own.
        probe: Whether training images are wanted too.

    Returns:
        The sets of all suites together.

    Raises:
        InputError: No such suite, no folder, or a folder without a single set.
    """
    opened = SuiteSets()
    for name, folder in _pairs(words, root):
        if not folder.is_dir():
            raise InputError(f"--suite {name}: {folder} is no folder")
        if name == "paper":
            _open_paper(folder, opened, probe)
            continue
        places = subfolders(folder) if name == "pictograms" else _webdatasets(folder, _DEEPEST)
        if not places:
            raise InputError(
                f"--suite {name}: {folder} holds no {'folder' if name == 'pictograms' else 'test/nshards.txt'}"
            )
        for place in places:
            _open_one(place, place.relative_to(folder).as_posix(), opened, probe)
    return opened


def training_split(path: str | Path) -> LabelledSet | None:
    """The training images of a labelled set, None without such a split; InputError where it has a mistake."""
    part = local_folder(path, "labelled pictures") / _TRAIN_SPLIT
    if not part.is_dir():
        return None
    inside = list(part.iterdir())
    if inside and not any(path.is_dir() or is_tar(path) or path.name == "nshards.txt" for path in inside):
        return None  # pictures alone: a class of that name
    return open_labelled(path, _TRAIN_SPLIT)


def _pairs(words: Sequence[str], root: Path | None) -> list[tuple[str, Path]]:
    pairs: list[tuple[str, Path]] = []
    waiting: str | None = None
    for word in [*words, None]:
        if word is not None and word not in SUITES:
            if waiting is None:
                raise InputError(f"--suite: no suite {word!r}; {nearest(word, SUITES)}")
            pairs.append((waiting, local_folder(word, "the sets of a suite")))
            waiting = None
            continue
        if waiting is not None:
            if root is None:
                raise InputError(f"--suite {waiting}: no folder; write --suite {waiting} DIR, or --root DIR")
            pairs.append((waiting, root.expanduser()))
        waiting = word
    return pairs


def _open_paper(root: Path, opened: SuiteSets, probe: bool) -> None:
    for name in LAYOUTS:
        try:
            data = open_paper_set(name, root)
        except InputError as error:
            opened.missing[name] = str(error)
            continue
        opened.sets.append(data)
        if probe:
            try:
                opened.training[name] = open_paper_set(name, root, _TRAIN_SPLIT)
            except InputError as error:
                opened.missing[name + _TRAINING] = str(error)


def _open_one(folder: Path, name: str, opened: SuiteSets, probe: bool) -> None:
    kind = folder / "dataset_type.txt"
    try:
        what = kind.read_text(encoding="utf-8").strip().lower() if kind.is_file() else "classification"
        if what == "retrieval":
            opened.pairs.append(open_captioned(folder))
            return
        if what != "classification":
            raise InputError(f"{kind} says {what!r}; only classification and retrieval can be evaluated")
        data = open_labelled(folder)
    except (InputError, OSError, UnicodeDecodeError) as error:
        opened.missing[name] = str(error)
        return
    opened.sets.append(data)
    try:
        train = training_split(folder) if probe else None
    except (InputError, OSError, UnicodeDecodeError) as error:
        opened.missing[name + _TRAINING] = str(error)
        return
    if train is not None:
        opened.training[data.name] = train


def _webdatasets(folder: Path, depth: int) -> list[Path]:
    """Folders with ``test/nshards.txt``, by path; nothing is looked for inside of one."""
    places: list[Path] = []
    for path in subfolders(folder):
        if (path / "test" / "nshards.txt").is_file():
            places.append(path)
        elif depth > 1:
            places += _webdatasets(path, depth - 1)
    return places
