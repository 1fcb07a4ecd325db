"""Results are passed on, the folders of this machine are not: errors without absolute paths.

What failed is written to results.json, analysis.json and the pages as :func:`without_places` leaves it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

_NO_PATH_BEFORE = r"(?<![\w.~/<>{}*-])"
_NO_NAME_BEHIND = r"(?![\w.-])"
_POSIX = re.compile(_NO_PATH_BEFORE + r"/(?:[^\s/'\"(),;:]+/)+[^\s/'\"(),;:]*")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:\\[^\s'\"(),;:]+")


def places_of(sources: Iterable[str | Path], pairs: Iterable[str | Path] = ()) -> dict[str, str]:
    """What results call the files and folders that a user has named: the last part of each.

    Args:
        sources: Files and folders.
        pairs: Sources of pairs; of these the folder that they are in counts too, since a table's pictures are there.
    """
    named = [*sources, *(part for path in pairs for part in (Path(path), Path(path).parent))]
    return {str(source): name for source in named if (name := Path(source).name)}


def without_places(text: str, places: Mapping[str, str]) -> str:
    """An error as results hold it, without an absolute path.

    Args:
        text: The error's line.
        places: Files and folders of this run -> what results call them. Whatever lies in such a folder keeps its
            path from there. Any other absolute path, which some library has put into the line, is cut to its last part;
            where one of its folders has a space in its name, what is behind the space stays.

    Returns:
        The line with names in place of the folders.
    """
    known: dict[str, str] = {}
    for place, name in places.items():
        path = Path(place.removeprefix("local-dir:").removesuffix(":best")).absolute()
        for absolute in (path, path.resolve()):
            known.setdefault(str(absolute), name)
    for form in sorted(known, key=len, reverse=True):
        pattern = _NO_PATH_BEFORE + re.escape(form) + _NO_NAME_BEHIND
        text = re.sub(pattern, known[form].replace("\\", r"\\"), text)
    text = _POSIX.sub(lambda match: PurePosixPath(match[0]).name, text)
    return _WINDOWS.sub(lambda match: PureWindowsPath(match[0]).name, text)
