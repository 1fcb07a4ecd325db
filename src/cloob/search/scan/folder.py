"""A folder of pictures, with captions beside them or without."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection as Paths
from collections.abc import Iterator, Mapping
from pathlib import Path

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, clean_caption
from cloob.data.shards.tar import TAR_SUFFIXES
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.data.sources.arrow import ARROW_SUFFIXES
from cloob.search.records import Value
from cloob.search.scan.collection import Found, LeftOut, is_excluded, newest, read_regular, stated
from cloob.search.scan.rows import Described

_IMAGES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_CAPTIONS = tuple(f".{extension}" for extension in CAPTION_EXTENSIONS)
_CONTAINERS = (*TAR_SUFFIXES, *ARROW_SUFFIXES)
_INDEX = "index.sqlite"
_NEVER = ("@eaDir", "#recycle", "System Volume Information", "node_modules")
"""Folders that file servers, Windows and npm make."""
_KINDS = 3


class Folder:
    """All pictures below a folder, by the endings of their names; see ``Collection``.

    Hidden files and folders, folders of ``_NEVER``, and folders that are an index themselves are passed over. A link
    is followed where it leads to a picture below the folder.

    Args:
        folder: The folder.
        exclude: Globs of paths below it, or of parts of these.
        described: What a table in it says of its pictures.
    """

    def __init__(self, folder: Path, exclude: tuple[str, ...] = (), described: Described | None = None) -> None:
        self.name = os.path.abspath(folder)  # noqa: PTH100 - links in it stay
        self.left_out = LeftOut()
        self.unlisted: list[str] = []
        self._exclude = exclude
        self._described = described

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures, folder by folder in order of their names."""
        self.left_out, self.unlisted = LeftOut(), []
        if self._described is not None:
            self._described.tell(self.left_out)
        others: Counter[str] = Counter()
        rows: set[int | None] = set()
        waiting = [self.name]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    shown = (each for each in entries if not each.name.startswith(".") and each.name not in _NEVER)
                    listed = sorted(shown, key=_name)
            except OSError as error:
                self.unlisted.append(folder)
                self.left_out.add("folder cannot be listed", f"{folder} ({error.strerror})")
                continue
            if any(entry.name == _INDEX for entry in listed):
                continue
            below = []
            captions = {_plain(entry.name): entry.path for entry in listed if entry.name.lower().endswith(_CAPTIONS)}
            for entry in listed:
                if self._exclude and is_excluded(os.path.relpath(entry.path, self.name), self._exclude):
                    if _plain(entry.name) not in captions:
                        self.left_out.add("excluded", entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
                elif entry.name.lower().endswith(_IMAGES):
                    if (found := self._found(entry, captions)) is not None:
                        if self._described is not None:
                            rows.add(self._described.row(found.path))
                        yield found
                elif entry.is_symlink() and entry.is_dir():
                    self.left_out.add("linked folder, not followed", entry.path)
                elif entry.name.lower().endswith(_CONTAINERS):
                    self.left_out.add("tar or Arrow file beside pictures", entry.path)
                elif _plain(entry.name) not in captions:
                    others[os.path.splitext(entry.name)[1].lower() or entry.name] += 1  # noqa: PTH122
            waiting += reversed(below)
        if others:
            kinds = [f"{count:,} {kind}" for kind, count in others.most_common(_KINDS)]
            rest = sum(count for _, count in others.most_common()[_KINDS:])
            kinds += [f"{rest:,} others"] * (rest > 0)
            self.left_out.add("file of another kind", ", ".join(kinds), others.total())
        for path in () if self._described is None else self._described.others(rows):
            if not is_excluded(os.path.relpath(path, self.name), self._exclude):
                self.left_out.add("row of the folder's table that names no picture of it", path)

    def read(self, found: Found) -> bytes:
        """The bytes of a picture's file."""
        return read_regular(found.path)

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption beside it or in the table, and the table's other columns."""
        caption, columns = self._described.of(found.path) if self._described else (None, {})
        if found.place is not None:
            caption = read_caption(found.place) or caption
        return caption, columns

    def _found(self, entry: os.DirEntry[str], captions: Mapping[str, str]) -> Found | None:
        if entry.is_symlink() and not self._leads_inside(entry.path):
            self.left_out.add("link that leads out of the folder, not followed", entry.path)
            return None
        stem = os.path.splitext(entry.name)[0]  # noqa: PTH122
        caption = next((captions[f"{stem}{ending}"] for ending in _CAPTIONS if f"{stem}{ending}" in captions), None)
        try:
            state = stated(entry.path)
            said = (None if caption is None else stated(caption), self._described and self._described.state)
        except OSError:  # reading it says why
            return Found(entry.path, None, None, caption)
        if state is None:
            self.left_out.add("pipe or device", entry.path)
            return None
        return Found(entry.path, state.st_size, newest(state, *(each for each in said if each)), caption)

    def _leads_inside(self, path: str) -> bool:
        root, target = os.path.realpath(self.name), os.path.realpath(path)
        return os.path.commonpath([root, target]) == root


def read_caption(path: str) -> str | None:
    """The caption in a file; None where it holds none that can be used."""
    try:
        if stated(path) is None:
            return None
        with open(path, "rb") as file:  # noqa: PTH123
            return clean_caption(file.read(MAX_CAPTION_BYTES + 1), path)
    except (OSError, BadSample):
        return None


def _plain(name: str) -> str:
    """A file's name with its ending in small letters."""
    stem, ending = os.path.splitext(name)  # noqa: PTH122
    return f"{stem}{ending.lower()}"


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name
