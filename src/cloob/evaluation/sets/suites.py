"""Suites: names for many sets at once. A set that is missing or broken does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cloob.data.content import Reader
from cloob.data.shards.spec import local_folder
from cloob.data.shards.tar import is_tar
from cloob.errors import InputError, nearest
from cloob.evaluation.sets.captioned import dataset_type, open_captioned
from cloob.evaluation.sets.labelled import LabelledSet, open_labelled, subfolders
from cloob.evaluation.sets.paper import LAYOUTS, open_paper_set

SUITES = {
    "paper": "the paper's eight sets, under one root",
    "pictograms": "every labelled set in a folder, each in a folder of its own",
    "vtab+": "every CLIP_benchmark WebDataset folder in a folder, up to three deep",
}

_TRAINING = " (training)"
_MAX_DEPTH = 3


@dataclass
class SuiteSets:
    """What a suite came to.

    ``missing`` says why a set is not among them; ``"NAME (training)"`` is a set whose training images cannot be used.
    """

    sets: list[LabelledSet] = field(default_factory=list)
    training: dict[str, LabelledSet] = field(default_factory=dict)  # where it was asked for
    pairs: list[Reader] = field(default_factory=list)  # for retrieval
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def training_failed(self) -> bool:
        """Whether there are training images that cannot be used."""
        return any(name.endswith(_TRAINING) for name in self.missing)

    def add(self, name: str, test: Callable[[], LabelledSet], train: Callable[[], LabelledSet | None] | None) -> None:
        """Adds a labelled set and its training images, or notes why one of them cannot be used."""
        failed = name
        try:
            data = test()
            self.sets.append(data)
            failed = name + _TRAINING
            if train is not None and (training := train()) is not None:
                self.training[data.name] = training
        except (InputError, OSError) as error:
            self.missing[failed] = str(error)


def open_suites(words: Sequence[str], root: Path | None = None, *, probe: bool = False) -> SuiteSets:
    """Opens suites; ``words`` are names, each followed by its folder if that is not ``root``: ``("paper", "/data")``.

    Raises:
        InputError: No such suite, no folder, or a folder without a single set.
    """
    opened = SuiteSets()
    rest = list(words)
    while rest:
        name = rest.pop(0)
        if name not in SUITES:
            raise InputError(f"--suite: no suite {name!r}; {nearest(name, SUITES)}")
        named = rest.pop(0) if rest and rest[0] not in SUITES else root
        if named is None:
            raise InputError(f"--suite {name}: no folder; write --suite {name} DIR, or --root DIR")
        folder = local_folder(named, "the sets of a suite")
        if not folder.is_dir():
            raise InputError(f"--suite {name}: {folder} is no folder")
        if name == "paper":
            for each in LAYOUTS:
                test, train = (partial(open_paper_set, each, folder, split) for split in ("test", "train"))
                opened.add(each, test, train if probe else None)
            continue
        places = subfolders(folder) if name == "pictograms" else _webdatasets(folder, _MAX_DEPTH)
        if not places:
            wanted = "folder" if name == "pictograms" else "test/nshards.txt"
            raise InputError(f"--suite {name}: {folder} holds no {wanted}")
        for place in places:
            _add_folder(opened, place, place.relative_to(folder).as_posix(), probe)
    return opened


def training_split(path: str | Path) -> LabelledSet | None:
    """The training images of a labelled set, None without such a split; InputError if it has a mistake."""
    part = local_folder(path, "labelled pictures") / "train"
    inside = list(part.iterdir()) if part.is_dir() else None
    if inside is None or (inside and not any(p.is_dir() or is_tar(p) or p.name == "nshards.txt" for p in inside)):
        return None  # pictures alone: a class of that name
    return open_labelled(path, "train")


def _add_folder(opened: SuiteSets, folder: Path, name: str, probe: bool) -> None:
    """Adds what ``dataset_type.txt`` says, a labelled set if there is none."""
    kind = dataset_type(folder)
    if kind in (None, "classification"):
        opened.add(name, partial(open_labelled, folder), partial(training_split, folder) if probe else None)
        return
    try:
        if kind != "retrieval":
            raise InputError(f"{folder}/dataset_type.txt says {kind!r}; only classification and retrieval can be")
        opened.pairs.append(open_captioned(folder))
    except (InputError, OSError) as error:
        opened.missing[name] = str(error)


def _webdatasets(folder: Path, depth: int) -> list[Path]:
    """Folders with ``test/nshards.txt``, by path; nothing is looked for inside of one."""
    places: list[Path] = []
    for path in subfolders(folder):
        if (path / "test" / "nshards.txt").is_file():
            places.append(path)
        elif depth > 1:
            places += _webdatasets(path, depth - 1)
    return places
