"""What a user writes for shards: here or elsewhere, a pattern of many, or a list; and the names in URLs and commands.

``sizes.json``, ``{"00000.tar": 9876, …}``, is the list: how many samples each shard of its folder holds.
"""

from __future__ import annotations

import glob
import json
import os
import re
import reprlib
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from cloob.data.shards.tar import is_tar
from cloob.errors import InputError, one_line, require

SIZES = "sizes.json"

_SCHEME = re.compile(r"(pipe|file):|[A-Za-z][A-Za-z0-9+.-]+://")
_SHARD_NAME = re.compile(r"[^/\s'\"=]+\.(?:tar(?:\.gz|\.bz2|\.xz)?|tgz)(?=$|[\s'\"?#;|&)])", re.IGNORECASE)
_BARE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_EXPECTED = '; {"shard.tar": count, …} is expected in a .json, pairs in JSON lines (.jsonl)'


def is_remote(spec: str) -> bool:
    return _SCHEME.match(spec) is not None and not spec.startswith("file:")


def local_path(spec: str) -> str:
    """``file:`` URLs as paths, and ``~`` as the home folder; InputError for a file of another host."""
    if not spec.startswith("file:"):
        return os.path.expanduser(spec)  # noqa: PTH111 - a Path would drop the last slash and fold others
    parts = urlsplit(spec)
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"{spec}: names a host, {parts.netloc!r}; a file of this machine is file:///PATH")
    return url2pathname(parts.path)


def local_folder(spec: str | Path, what: str) -> Path:
    """A folder on this machine, of ``what`` in the error; InputError for an address or a command."""
    if is_remote(str(spec)):
        raise InputError(f"{spec}: {what} are read from a folder of this machine; download them first")
    return Path(local_path(str(spec)))


def is_pattern(spec: str) -> bool:
    return any(c in spec for c in "{*?[")


def expand(pattern: str, *, escape: bool = True) -> list[str]:
    """The strings that a brace pattern (``{000..999}``, ``{a,b}``) stands for, in order.

    ``escape``: a backslash makes a brace literal; in a command it is the shell's.
    """
    try:
        return list(require("braceexpand", "train").braceexpand(pattern, escape=escape))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{pattern}: not a brace pattern: {error}") from None


def shard_name(url: str) -> str:
    """The file name of the shard that a URL or a command fetches: the last word in it that ends like a tar."""
    names = _SHARD_NAME.findall(url)
    return str(names[-1]) if names else re.split(r"[/\s]", url.rstrip("/ -"))[-1][-80:] or url[-80:]


def sibling(url: str, name: str) -> str | None:
    """The same URL or command for another file in the shard's folder; None when no shard name is found in it."""
    matches = list(_SHARD_NAME.finditer(url))
    return f"{url[: matches[-1].start()]}{name}{url[matches[-1].end() :]}" if matches else None


def local_shards(spec: str) -> list[Path]:
    path = Path(local_path(spec))
    return _all_there(spec, tars_in(path)) if path.is_dir() else matching_files(str(path))


def tars_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_tar(path) and path.is_file())


def check_complete(folder: Path) -> None:
    """Refuses a folder that lacks a tar which its ``sizes.json`` names."""
    missing = [name for name in read_sizes(folder / SIZES) if "/" not in name and not (folder / name).is_file()]
    if missing:
        fix = f"get it again, or count anew: cloob data {shlex.quote(str(folder))} --count"
        raise InputError(f"{folder / missing[0]}: no such file, but {SIZES} names it ({len(missing)} missing); {fix}")


def matching_files(pattern: str) -> list[Path]:
    """The files of a brace pattern or glob; InputError where a glob matches nothing or a file is missing."""
    paths: list[Path] = []
    for item in expand(pattern, escape=os.sep == "/"):  # elsewhere a backslash parts folders
        matches = sorted(glob.glob(item)) if any(c in item for c in "*?[") else [item]  # noqa: PTH207
        if not matches:
            raise InputError(f"{item}: no file matches")
        paths += map(Path, matches)
    return _all_there(pattern, paths)


def listed_shards(path: Path) -> list[Path]:
    """The shards that a list on disk names, which lie beside it; InputError where one is missing or it is no list."""
    return _all_there(str(path), [path.parent / _beside(str(path), name) for name in read_sizes(path)])


def listed_url(base: str, name: str) -> str:
    """The address of what a list elsewhere names; ``base`` is its own address or command, as the user typed it."""
    head, found, tail = base.rpartition(SIZES)
    if not found:
        raise InputError(f"{base}: only a {SIZES} beside its shards may list them")
    return f"{head}{_beside(base, name)}{tail}"


def _beside(where: str, name: str) -> str:
    if not _BARE.fullmatch(name):
        rule = "a list may only name files beside itself, by letters, digits, '.', '_' and '-'"
        raise InputError(f"{where}: names {reprlib.repr(name)}; {rule}; give other shards to --data as a pattern")
    return name


def parse_sizes(where: str, content: bytes) -> dict[str, int]:
    try:
        counts = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({one_line(error)}){_EXPECTED}") from None
    listed: dict[str, Any] = counts if isinstance(counts, dict) else {"all of it": [counts]}
    for name, count in listed.items():
        if type(count) is not int or count < 0:
            raise InputError(f"{where}: {name[:80]!r} has {reprlib.repr(count)[:60]}, no number of samples{_EXPECTED}")
    return listed


def read_sizes(path: Path) -> dict[str, int]:
    return parse_sizes(str(path), path.read_bytes()) if path.is_file() else {}


def _all_there(spec: str, paths: list[Path]) -> list[Path]:
    if not paths:
        raise InputError(f"{spec}: names no shard")
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError(f"{missing[0]}: no such file ({len(missing)} of the {len(paths)} files in {spec})")
    return paths
