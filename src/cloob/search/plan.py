"""What is to be done for a source: its files are compared with what the index knows, by
size and time, and none is opened.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cloob.search.records import FileState, Item, valid
from cloob.search.scan.collection import Collection, FoundPicture, LeftOut
from cloob.search.store import Store

# not worth another try
_FINAL = re.compile("^(corrupt image|embedding not finite)")
_NOT_MOUNTED = (
    "picture kept, as its folder is there and empty, or another disk (delete the"
    " folder, or --remove-all)"
)
_UNREAD = ("folder cannot be listed", _NOT_MOUNTED)


@dataclass
class Summary:
    added: int = 0  # new pictures, renamed ones included
    changed: int = 0  # pictures whose file holds something else now
    described: int = 0  # files of the same bytes with another time, caption or columns
    removed: int = 0
    unchanged: int = 0  # files that were not opened
    embedded: int = 0  # pictures that went through the model
    # files that cannot be read by the reason why; old ones included
    unreadable: LeftOut = field(default_factory=LeftOut)
    left_out: LeftOut = field(default_factory=LeftOut)
    # by source, why nothing of it was done or removed
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def faults(self) -> Counter[str]:
        return self.unreadable.counts

    @property
    def unread(self) -> int:
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
    tasks: list[Task]
    gone: list[FileState]


def make_plan(
    store: Store,
    collection: Collection,
    summary: Summary,
    *,
    remove_all: bool = False,
) -> Plan:
    """What has to be read of a source, and what is gone; counts the rest."""
    states = {state.path: state for state in store.states(collection.name)}
    collection.left_out = summary.left_out
    found = dict(_scan(collection, summary.left_out))
    why = _why_refused(states.values(), found, collection)
    if why and not (remove_all and states):
        summary.refused[collection.name] = why
        return Plan([], [])
    tasks = [
        Task(picture, states.get(path), collection)
        for path, picture in found.items()
        if _has_changed(picture, states.get(path), summary)
    ]
    gone = [states[path] for path in states.keys() - found.keys()]
    gone = _without(gone, [f"{place}/" for place in collection.unlisted])
    if not remove_all:
        gone = _without_mounts(gone, found.keys() & states.keys(), collection)
    return Plan(tasks, gone)


def _without_mounts(
    gone: list[FileState], present: Iterable[str], collection: Collection
) -> list[FileState]:
    """What is gone without what lay on a disk that is away, which is counted."""
    for mount in _mounts(gone, list(present), collection.name):
        rest = _without(gone, [mount])
        collection.left_out.add(_NOT_MOUNTED, mount, len(gone) - len(rest))
        gone = rest
    return gone


def _scan(
    collection: Collection, left_out: LeftOut
) -> Iterator[tuple[str, FoundPicture]]:
    """What a source names, with names that an index can hold."""
    for picture in collection.scan():
        if valid(picture.path) == picture.path:
            yield picture.path, picture
        else:
            left_out.add("name that is not UTF-8, to be renamed", picture.path)


def _why_refused(
    states: Iterable[FileState], found: dict[str, FoundPicture], collection: Collection
) -> str:
    """Why a source is not read, empty if it is: there is nothing of it."""
    if collection.unlisted or not all(map(_is_missing, found.values())):
        return ""
    n_indexed = sum(state.id is not None for state in states)
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


def _without(states: Iterable[FileState], places: Iterable[str]) -> list[FileState]:
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
    mounts = [f"{place}/" for place in sorted(places) if _may_be_a_mount(place)]
    return [
        mount for mount in mounts if not any(path.startswith(mount) for path in present)
    ]


def _existing(folder: str, source: str) -> str:
    """The folder, or the one above it that is there, up to the source."""
    while folder.startswith(f"{source}/") and not os.path.isdir(folder):  # noqa: PTH112
        folder = os.path.dirname(folder)  # noqa: PTH120
    return folder if folder.startswith(f"{source}/") else source


def _may_be_a_mount(folder: str) -> bool:
    """Whether a folder is empty, as where a disk was, or is a disk of its own."""
    return os.path.ismount(folder) or not os.listdir(folder)  # noqa: PTH208
