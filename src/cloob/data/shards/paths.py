"""Which shards a path, a folder, a pattern or a list means; ``sizes.json``, ``{"00000.tar": 9876, …}``, is the list."""

from __future__ import annotations

import glob
import json
import os
import re
import reprlib
import shlex
from pathlib import Path

from cloob.data.shards.spec import expand, local_path
from cloob.data.shards.tar import is_tar
from cloob.errors import InputError

SIZES = "sizes.json"
"""The name of a list: how many samples each shard of its folder holds."""

_BARE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_EXPECTED = (
    '; a .json is expected to list shards, {"shard.tar": count, …}; pictures and captions are read from JSON lines '
    '(.jsonl), {"filepath": …, "title": …} a line'
)


def local_shards(spec: str) -> list[Path]:
    """The tars that a local path, folder or pattern names; InputError where there are none."""
    spec = local_path(spec)
    path = Path(spec)
    tars = tars_in(path) if path.is_dir() else matching_files(spec)
    if not tars:
        raise InputError(f"{spec}: no tar shard found")
    return tars


def tars_in(folder: Path) -> list[Path]:
    """The tars in a folder itself, sorted."""
    return sorted(path for path in folder.iterdir() if is_tar(path) and path.is_file())


def check_complete(folder: Path) -> None:
    """Refuses a folder that lacks a tar which its ``sizes.json`` names."""
    missing = [name for name in read_sizes(folder / SIZES) if "/" not in name and not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder / missing[0]}: no such file, but {SIZES} beside it names it ({len(missing)} missing); get it "
            f"again, or count anew what is there: cloob data {shlex.quote(str(folder))} --count"
        )


def is_pattern(spec: str) -> bool:
    """Whether a path has braces or the marks of a glob in it."""
    return any(c in spec for c in "{*?[")


def matching_files(pattern: str) -> list[Path]:
    """The files of a brace pattern or glob; InputError where a glob matches nothing or a file is missing."""
    paths: list[Path] = []
    for item in expand(pattern, escape=os.sep == "/"):  # elsewhere a backslash parts folders
        matches = sorted(glob.glob(item)) if any(c in item for c in "*?[") else [item]  # noqa: PTH207
        if not matches:
            raise InputError(f"{item}: no file matches")
        paths += [Path(match) for match in matches]
    return _all_there(pattern, paths)


def listed_shards(path: Path) -> list[Path]:
    """The shards that a list on disk names, which lie beside it; InputError where one is missing or it is no list."""
    return _all_there(str(path), [path.parent / check_bare(str(path), name) for name in read_sizes(path)])


def listed_url(base: str, name: str) -> str:
    """The address of what a list elsewhere names; ``base`` is its own address or command, as the user typed it."""
    head, found, tail = base.rpartition(SIZES)
    if not found:
        raise InputError(f"{base}: only a {SIZES} beside its shards may list them")
    return f"{head}{check_bare(base, name)}{tail}"


def check_bare(where: str, name: str) -> str:
    """A name in a list: InputError unless it is that of a file beside it."""
    if not _BARE.fullmatch(name):
        raise InputError(
            f"{where}: names {reprlib.repr(name)}; a list may only name files beside itself, by letters, digits, '.', "
            "'_' and '-'; give other shards to --data yourself, as a pattern"
        )
    return name


def parse_sizes(where: str, content: bytes) -> dict[str, int]:
    """The counts in a list; InputError unless it is a JSON object of counts."""
    try:
        counts = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({str(error)[:200]}){_EXPECTED}") from None
    if not isinstance(counts, dict):
        raise InputError(f"{where}: found a {type(counts).__name__}{_EXPECTED}")
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise InputError(f"{where}: {name[:80]!r} has {reprlib.repr(count)[:60]}, no number of samples{_EXPECTED}")
    return counts


def read_sizes(path: Path) -> dict[str, int]:
    """The counts in a local list, none without such a file."""
    try:
        return parse_sizes(str(path), path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _all_there(spec: str, paths: list[Path]) -> list[Path]:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file ({len(missing)} of the {len(paths)} files in {spec})")
    return paths
