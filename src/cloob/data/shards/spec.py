"""What a user writes for shards: here or elsewhere, one or a pattern of many; and the
names in URLs and commands.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from cloob.errors import InputError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SIZES = "sizes.json"

_RANGE = re.compile(
    r"(?:(-?[0-9]+)\.\.(-?[0-9]+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.(-?[0-9]+))?"
)
_SCHEME = re.compile(r"(pipe|file):|[A-Za-z][A-Za-z0-9+.-]+://")
SHARD_NAME = re.compile(
    r"[^/\s'\"=]+\.(?:tar(?:\.gz|\.bz2|\.xz)?|tgz)(?=$|[\s'\"?#;|&)])", re.IGNORECASE
)


def is_remote(spec: str) -> bool:
    return _SCHEME.match(spec) is not None and not spec.startswith("file:")


def local_path(spec: str) -> str:
    """``file:`` URLs as paths, and ``~`` as the home folder."""
    if not spec.startswith("file:"):
        return os.path.expanduser(spec)  # noqa: PTH111
    parts = urlsplit(spec)
    if parts.netloc not in ("", "localhost"):
        raise InputError(
            f"{spec}: names a host, {parts.netloc!r}; a file of this machine is"
            " file:///PATH"
        )
    return url2pathname(parts.path)


def local_folder(spec: str | Path, what: str) -> Path:
    """A folder on this machine, with ``what`` in it."""
    folder = Path(spec if is_remote(str(spec)) else local_path(str(spec)))
    if is_remote(str(spec)) or not folder.is_dir():
        why = "download them first" if is_remote(str(spec)) else "no such folder"
        raise InputError(
            f"{spec}: {what} are read from a folder of this machine; {why}"
        )
    return folder


def is_pattern(spec: str) -> bool:
    return any(c in spec for c in "{*?[")


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES)


def expand(pattern: str, *, escape: bool = True) -> list[str]:
    """The strings of a brace pattern (``{000..999}``, ``{a,b}``), as in a shell;
    ``escape``: by a backslash.
    """
    words, wrong = [""], ""
    outer: list[tuple[list[str], list[str]]] = []
    for token in re.findall(
        r"\\.|[{},]|[^\\{},]+|\\" if escape else r"[{},]|[^{},]+", pattern, re.DOTALL
    ):
        if token == "{":
            outer.append(
                (words, [])
            )  # what stands before it, and the alternatives up to the last comma
            words = [""]
        elif token == "," and outer:
            outer[-1][1].extend(words)
            words = [""]
        elif token == "}" and outer:
            before, choices = outer.pop()
            inside = (
                [*choices, *words]
                if choices
                else _range(words) or [f"{{{word}}}" for word in words]
            )
            words = [start + choice for start in before for choice in inside]
        elif token == "}":
            wrong = "a closing brace too many"
        else:
            words = [
                word
                + (
                    token[1:]
                    if escape and len(token) == 2 and token[0] == "\\"
                    else token
                )
                for word in words
            ]
    if wrong or outer:
        raise InputError(
            f"{pattern}: not a brace pattern: {wrong or 'a brace is not closed'}"
        )
    return words


def _range(words: list[str]) -> list[str]:
    """The numbers or letters of ``first..last`` or ``first..last..step``; empty for
    other words.
    """
    ends = _RANGE.fullmatch(words[0]) if len(words) == 1 else None
    if ends is None:
        return []
    first, last, step = (
        ends[1] or ends[3],
        ends[2] or ends[4],
        abs(int(ends[5] or 1)) or 1,
    )
    start, stop = (ord(first), ord(last)) if ends[3] else (int(first), int(last))
    numbers = (
        range(start, stop + 1, step) if start <= stop else range(start, stop - 1, -step)
    )
    width = (
        max(len(first), len(last))
        if any(re.match("-?0[0-9]", end) for end in (first, last))
        else 0
    )
    return [chr(number) if ends[3] else f"{number:0{width}d}" for number in numbers]


def shard_name(url: str) -> str:
    """The file name of the shard that a URL or a command fetches: the last word in it
    that ends like a tar.
    """
    names = SHARD_NAME.findall(url)
    return (
        str(names[-1])
        if names
        else re.split(r"[/\s]", url.rstrip("/ -"))[-1][-80:] or url[-80:]
    )


def tars_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_tar(path) and path.is_file())


def matching_files(pattern: str) -> list[Path]:
    """The files of a brace pattern or glob, all of which must be there."""
    paths = [
        Path(match)
        for item in expand(pattern)
        for match in sorted(glob.glob(item)) or [item]  # noqa: PTH207
    ]
    if missing := [path for path in paths if not path.is_file()]:
        wrong = "no file matches" if glob.has_magic(str(missing[0])) else "no such file"
        raise InputError(
            f"{missing[0]}: {wrong} ({len(missing)} of the {len(paths)} files in"
            f" {pattern})"
        )
    return paths
