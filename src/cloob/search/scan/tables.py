"""A table of pictures: CSV, TSV, Parquet or JSON lines with a column of paths."""

from __future__ import annotations

import os
from collections.abc import Collection as Paths
from collections.abc import Iterator, Mapping
from pathlib import Path

from cloob.search.records import Value
from cloob.search.scan.collection import Found, LeftOut, is_excluded, newest, read_regular, stated
from cloob.search.scan.rows import Rows


class Table:
    """The pictures that a table names, relative to its folder; see ``Collection``.

    Several rows of one path are one picture: their captions are joined, and the other columns are those of the first.

    Args:
        path: The table.
        image_column: Column with the paths.
        caption_column: Column with the captions; None: see ``Rows``.
        exclude: Globs of the paths as the table has them, or of parts of these.
    """

    def __init__(
        self, path: Path, image_column: str, caption_column: str | None = None, exclude: tuple[str, ...] = ()
    ) -> None:
        self.name = os.path.abspath(path)  # noqa: PTH100 - links in it stay
        self.left_out = LeftOut()
        self.unlisted: list[str] = []
        self._exclude = exclude
        self._rows = Rows(path, image_column, caption_column)
        self._state = path.stat()

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures in order of their first rows; one that is not there is found with no bytes."""
        self.left_out = LeftOut()
        self._rows.tell(self.left_out, self.name)
        folder = os.path.dirname(self.name)  # noqa: PTH120
        places: dict[str, list[int]] = {}
        for row, stored in enumerate(self._rows.images()):
            if not stored or "\0" in stored:
                self.left_out.add("row without a path", f"row {row + 1:,}")
            elif self._exclude and is_excluded(stored, self._exclude):
                self.left_out.add("excluded", stored)
            else:
                places.setdefault(os.path.normpath(os.path.join(folder, stored)), []).append(row)  # noqa: PTH118
        for path, rows in places.items():
            try:
                state = stated(path)
            except OSError:  # reading it says why
                yield Found(path, None, None, rows)
                continue
            if state is None:
                yield Found(path, 0, None, rows)
            else:
                yield Found(path, state.st_size, newest(state, self._state), rows)

    def read(self, found: Found) -> bytes:
        """The bytes of a picture's file."""
        return read_regular(found.path)

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The captions of its rows, a line each, and the other columns of the first."""
        described = [self._rows.row(row) for row in found.place]
        captions = dict.fromkeys(caption for caption, _ in described if caption)
        return "\n".join(captions) or None, described[0][1]
