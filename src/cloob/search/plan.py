"""What is to be done for a source: its files are compared with what the index knows, by
size and time, and none is opened.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cloob.search.records import FileState, Item, valid
from cloob.search.sources import Collection, FoundPicture, LeftOut

# not worth another try
_FINAL = re.compile("^(corrupt image|embedding not finite)")
_NOT_MOUNTED = (
    "picture kept, as its folder is there and empty, or another disk (delete the"
    " folder, or --remove-all)"
)
_UNREAD = ("folder cannot be listed", _NOT_MOUNTED)


@dataclass
class Summary:
    """What an update did, in pictures."""

    added: int = 0  # new ones, renamed ones included
    changed: int = 0  # their file holds something else now
    described: int = 0  # the same bytes with another time, caption or columns
    removed: int = 0
    unchanged: int = 0  # their files were not opened
    embedded: int = 0  # they went through the model
    # files that cannot be read by the reason why; old ones included
    unreadable: LeftOut = field(default_factory=LeftOut)
    left_out: LeftOut = field(default_factory=LeftOut)
    # by source, why nothing of it was done or removed
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def faults(self) -> Counter[str]:
        """How many files cannot be read, by reason."""
        return self.unreadable.counts

    @property
    def unread(self) -> int:
        """How many places were not looked into."""
        return sum(self.left_out.counts[reason] for reason in _UNREAD)

    def add_fault(self, fault: str, path: str) -> None:
        """Counts a file that cannot be read, without the details; those of a decoder
        say what to install.
        """
        if not fault.startswith("no decoder"):
            fault = re.split(r" \(|:", fault)[0]
        self.unreadable.add(fault, path)

    def add_item(self, state: FileState | None, item: Item) -> None:
        """Counts what is new of a file: its path, bytes or description."""
        if state is None or state.id is None:
            self.added += 1
        elif state.content != item.content:
            self.changed += 1
        else:
            self.described += 1


@dataclass(frozen=True)
class Task:
    """A file that has to be read."""

    found: FoundPicture
    state: FileState | None  # what the index knows of it
    collection: Collection


@dataclass(frozen=True)
class Plan:
    """What is to be read of a source, and what of it is gone."""

    collection: Collection
    tasks: list[Task]
    gone: list[FileState]


def make_plan(
    collection: Collection,
    states: Mapping[str, FileState],
    summary: Summary,
    *,
    remove_all: bool = False,
) -> Plan:
    """What has to be read of a source, and what is gone of the known ``states`` by
    path; counts the rest.
    """
    found = dict(_scan(collection))
    why = _why_refused(states, found, collection)
    if why and not (remove_all and states):
        summary.refused[collection.name] = why
        return Plan(collection, [], [])
    tasks = [
        Task(picture, states.get(path), collection)
        for path, picture in found.items()
        if _has_changed(picture, states.get(path), summary)
    ]
    missing = [states[path] for path in states.keys() - found.keys()]
    gone = _outside(missing, [f"{place}/" for place in collection.unlisted])
    if not remove_all:
        for mount in _mounts(gone, found.keys() & states.keys(), collection.name):
            rest = _outside(gone, [mount])
            collection.left_out.add(_NOT_MOUNTED, mount, len(gone) - len(rest))
            gone = rest
    return Plan(collection, tasks, gone)


def _scan(collection: Collection) -> Iterator[tuple[str, FoundPicture]]:
    """What a source names, with names that an index can hold."""
    for picture in collection.scan():
        if valid(picture.path) == picture.path:
            yield picture.path, picture
        else:
            reason = "name that is not UTF-8, to be renamed"
            collection.left_out.add(reason, picture.path)


def _why_refused(
    states: Mapping[str, FileState],
    found: Mapping[str, FoundPicture],
    collection: Collection,
) -> str:
    """Why a source is not read, empty if it is: there is nothing of it."""
    if collection.unlisted or not all(map(_is_missing, found.values())):
        return ""
    n_indexed = sum(state.id is not None for state in states.values())
    if n_indexed:
        return (
            f"none of its {n_indexed:,} pictures is there any more (not mounted?), so"
            " nothing was removed; --remove-all removes them"
        )
    return "" if found else "no pictures in it"


def _is_missing(picture: FoundPicture) -> bool:
    """Whether a table names a file that is not there."""
    return picture.bytes == 0 and picture.mtime_ns is None


def _has_changed(
    picture: FoundPicture, state: FileState | None, summary: Summary
) -> bool:
    """Whether a file has to be read; counts it otherwise."""
    if state is None or picture.bytes not in (None, state.bytes):
        return True
    if picture.mtime_ns != state.mtime_ns:
        return True
    if state.fault is None:
        summary.unchanged += 1
        return False
    if _is_missing(picture) or _FINAL.search(state.fault):
        summary.add_fault(state.fault, state.path)
        return False
    return True


def _outside(states: Iterable[FileState], places: Iterable[str]) -> list[FileState]:
    """The files that lie in none of the places."""
    beginnings = tuple(places)
    return [state for state in states if not state.path.startswith(beginnings)]


def _mounts(
    gone: Iterable[FileState], present: Iterable[str], source: str
) -> list[str]:
    """The folders of disks that are not mounted: a folder that is there and empty, or
    another disk, and has none of its pictures any more.
    """
    folders = {os.path.dirname(state.path) for state in gone}  # noqa: PTH120
    places = {_existing(folder, source) for folder in folders} - {source}
    mounts = {f"{place}/" for place in places if _may_be_a_mount(place)}
    for path in present:
        mounts = {mount for mount in mounts if not path.startswith(mount)}
    return sorted(mounts)


def _existing(folder: str, source: str) -> str:
    """The folder, or the one above it that is there, up to the source."""
    while folder.startswith(f"{source}/") and not os.path.isdir(folder):  # noqa: PTH112
        folder = os.path.dirname(folder)  # noqa: PTH120
    return folder if folder.startswith(f"{source}/") else source


def _may_be_a_mount(folder: str) -> bool:
    """Whether a folder is empty, as where a disk was, or is a disk of its own."""
    return os.path.ismount(folder) or not os.listdir(folder)  # noqa: PTH208
