"""Folders of pictures, with captions beside them or a table of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cloob.data.batch import BadSample, clean_caption, read_pair_file
from cloob.data.source import CAPTION_SUFFIX, IMAGE_SUFFIXES
from cloob.data.sources.folder import captions_by_stem, walk
from cloob.search.database import is_index
from cloob.search.records import INDEX_FILE
from cloob.search.scan.collection import (
    Collection,
    Description,
    FoundPicture,
    state_of,
    time_of,
)
from cloob.search.scan.table import Table

# Made by file servers, Windows and npm.
_NEVER = ("@eaDir", "#recycle", "System Volume Information", "node_modules")


class Folder(Collection):
    """All pictures below a folder, or one; ``table`` describes some.

    Their places are the files of their captions.
    """

    def __init__(self, folder: Path, table: Table | None = None) -> None:
        super().__init__(os.path.abspath(folder))  # noqa: PTH100
        self._table = table

    def scan(self) -> Iterator[FoundPicture]:
        """The pictures in the folder and below it, or the source's only one."""
        if os.path.isfile(self.name):  # noqa: PTH113
            folder, name = os.path.split(self.name)
            found = self._found(folder, name, captions_by_stem(os.listdir(folder)))  # noqa: PTH208
            yield from [found] if found else []
            return
        described: set[int] = set()  # rows of the table
        for folder, folders, names in walk(self.name, self._note_unlisted):
            if INDEX_FILE in names and is_index(Path(folder, INDEX_FILE)):
                self._note_index(folder, folders, names)
                folders.clear()
                continue
            folders[:] = [name for name in folders if self._is_followed(folder, name)]
            captions = captions_by_stem(names)
            pictures = [self._picture(folder, name, captions) for name in names]
            for found in filter(None, pictures):
                described.update(self._rows_of(found))
                yield found
        self._note_rows(described)

    def _rows_of(self, found: FoundPicture) -> list[int]:
        return self._table.rows_of(found.path) if self._table else []

    def _note_unlisted(self, error: OSError) -> None:
        self.unlisted.append(error.filename)
        example = f"{error.filename} ({error.strerror})"
        self.left_out.add("folder cannot be listed", example)

    def _note_index(
        self, folder: str, folders: Sequence[str], names: Sequence[str]
    ) -> None:
        """Counts a folder with an index of its own, unless nothing else is in it."""
        if folders or any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            self.left_out.add("folder with an index of its own", folder)

    def _is_followed(self, folder: str, name: str) -> bool:
        """Whether pictures of a sub-folder belong to the source; counts those that do
        not.
        """
        path = os.path.join(folder, name)  # noqa: PTH118
        if name in _NEVER:
            return False
        if os.path.islink(path):  # noqa: PTH114
            self.left_out.add("linked folder, not followed", path)
            return False
        return True

    def _picture(
        self, folder: str, name: str, captions: Mapping[str, str]
    ) -> FoundPicture | None:
        """A file as a picture; what else it may be is counted."""
        path = os.path.join(folder, name)  # noqa: PTH118
        lower = name.lower()
        if lower.endswith(CAPTION_SUFFIX):
            return None
        if lower.endswith(IMAGE_SUFFIXES):
            return self._found(folder, name, captions)
        self.left_out.add("file of another kind", path)
        return None

    def _note_rows(self, described: set[int]) -> None:
        """Counts rows of the folder's table that name none of its pictures."""
        for path, rows in self._table.by_path.items() if self._table else ():
            if described.isdisjoint(rows):
                self.left_out.add(
                    "row of the folder's table that names no picture of it", path
                )

    def describe(self, found: FoundPicture) -> Description:
        """The caption and columns of a picture: of its text file, else of the table."""
        described = Description(None, {})
        if self._table:
            described = self._table.describe_rows(self._rows_of(found))
        if found.place:
            try:
                text = read_pair_file(found.place, found.path, "caption")
                caption = clean_caption(text, found.path)
                return Description(caption, described.columns)
            except BadSample as bad:
                if bad.reason != "empty caption":
                    self.left_out.add(bad.reason, found.place)
        return described

    def _found(
        self, folder: str, name: str, captions: Mapping[str, str]
    ) -> FoundPicture | None:
        """A picture with its size and time; None where it is no file of the source."""
        path = os.path.join(folder, name)  # noqa: PTH118
        beside = captions.get(name.rpartition(".")[0])
        caption = os.path.join(folder, beside) if beside else ""  # noqa: PTH118
        try:
            state: os.stat_result | None = os.lstat(path)
            if state and not stat.S_ISREG(state.st_mode):
                state = self._target(path)
            if state is None:
                return None
            beside_it = state_of(caption) if caption else None
            table = self._table.state if self._table else None
            time = time_of(state, beside_it, table)
            return FoundPicture(path, state.st_size, time, caption)
        except OSError:  # reading it reports why
            return FoundPicture(path, None, None, caption)

    def _target(self, path: str) -> os.stat_result | None:
        """The file that a link leads to within the folder; counts what else it is."""
        root = os.path.realpath(self.name)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            self.left_out.add("link that leads out of the folder, not followed", path)
            return None
        target = state_of(path)
        if target is None:
            self.left_out.add("pipe or device", path)
        return target
