"""What a user writes for shards: here or elsewhere, one or a pattern of many."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cloob.errors import InputError, require

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz")

_SCHEME = re.compile(r"file:|[A-Za-z][A-Za-z0-9+.-]+://")


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
    return unquote(parts.path)


def local_folder(spec: str | Path, what: str) -> Path:
    """A folder on this machine, with ``what`` in it."""
    if is_remote(str(spec)):
        why = "download them first"
    else:
        folder = Path(local_path(str(spec)))
        if folder.is_dir():
            return folder
        why = "no such folder"
    raise InputError(f"{spec}: {what} are read from a folder of this machine; {why}")


def is_pattern(spec: str) -> bool:
    return any(c in spec for c in "{*?[")


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES)


def expand(pattern: str) -> list[str]:
    """The strings of a brace pattern (``{000..999}``, ``{a,b}``), as in a shell."""
    braceexpand = require("braceexpand", "train")
    try:
        return list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise InputError(
            f"{pattern}: not a brace pattern: a brace is not closed, or none was opened"
        ) from None


def tars_in(folder: Path) -> list[Path]:
    """The tars of a folder by name."""
    return sorted(path for path in folder.iterdir() if is_tar(path) and path.is_file())


def matching_files(pattern: str) -> list[Path]:
    """The files of a brace pattern or glob, all of which must be there."""
    paths: list[Path] = []
    for item in expand(pattern):
        matches = sorted(glob.glob(item)) or [item]  # noqa: PTH207
        paths += map(Path, matches)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        wrong = "no file matches" if is_pattern(str(missing[0])) else "no such file"
        raise InputError(
            f"{missing[0]}: {wrong} ({len(missing)} of the {len(paths)} files in"
            f" {pattern})"
        )
    return paths
