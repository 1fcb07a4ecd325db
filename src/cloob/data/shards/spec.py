"""What a user writes for shards: here or elsewhere, one or a pattern of many."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from cloob.errors import InputError, require

TAR_SUFFIXES = (".tar", ".tar.gz", ".tar.xz")


def is_remote(spec: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", spec) is not None


def local_folder(spec: str | Path, what: str) -> Path:
    """A folder on this machine, with ``what`` in it."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    why = "download them first" if is_remote(str(spec)) else "no such folder"
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
    """The files of a brace pattern or glob, of which every part has to name some."""
    paths: list[Path] = []
    for item in expand(pattern):
        found = sorted(glob.glob(item))  # noqa: PTH207
        if not found:
            raise InputError(f"{item}: no such file (of {pattern})")
        paths += map(Path, found)
    return paths
