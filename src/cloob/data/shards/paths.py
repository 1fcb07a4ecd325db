"""Which tars on local disks a path, a folder, a pattern or a list means."""

from __future__ import annotations

import glob
import os
import shlex
from pathlib import Path

from cloob.data.shards.sizes import SIZES, check_bare, read_sizes
from cloob.data.shards.spec import expand, local_path
from cloob.data.shards.tar import is_tar
from cloob.errors import InputError


def local_shards(spec: str) -> list[Path]:
    """The tars that a local path, folder or pattern names; InputError where there are none."""
    spec = local_path(spec)
    path = Path(spec)
    tars = tars_in(path) if path.is_dir() else matching_files(spec)
    if not tars:
        raise InputError(f"{spec}: no tar shard found")
    return tars


def tars_in(folder: Path) -> list[Path]:
    """The tars that lie in a folder itself, sorted."""
    return sorted(path for path in folder.iterdir() if is_tar(path) and path.is_file())


def check_whole(folder: Path) -> None:
    """Refuses a folder that lacks a tar which its ``sizes.json`` names.

    Raises:
        InputError: One is missing, or the list is none.
    """
    missing = [name for name in read_sizes(folder / SIZES) if "/" not in name and not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder / missing[0]}: no such file, but {SIZES} beside it names it ({len(missing)} missing); get it "
            f"again, or count anew what is there: cloob data {shlex.quote(str(folder))} --count"
        )


def listed_shards(path: Path) -> list[Path]:
    """The shards that a list on disk names, which lie beside it.

    Raises:
        InputError: It is no list, names what does not lie beside it, or a shard is missing.
    """
    return _all_there(str(path), [path.parent / check_bare(str(path), name) for name in read_sizes(path)])


def is_pattern(spec: str) -> bool:
    """Whether a path has braces or the marks of a glob in it."""
    return any(c in spec for c in "{*?[")


def matching_files(pattern: str) -> list[Path]:
    """The files of a brace pattern or glob.

    Raises:
        InputError: A glob matches nothing, or a file that the braces name is missing.
    """
    paths: list[Path] = []
    for item in expand(pattern, escape=os.sep == "/"):  # elsewhere a backslash parts folders
        matches = sorted(glob.glob(item)) if any(c in item for c in "*?[") else [item]  # noqa: PTH207
        if not matches:
            raise InputError(f"{item}: no file matches")
        paths += [Path(match) for match in matches]
    return _all_there(pattern, paths)


def _all_there(spec: str, paths: list[Path]) -> list[Path]:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file ({len(missing)} of the {len(paths)} files in {spec})")
    return paths
