"""What a user writes for shards: local or elsewhere, a pattern of many, and the names in URLs and commands."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from cloob.errors import InputError, require

_SCHEME = re.compile(r"(pipe|file):|[A-Za-z][A-Za-z0-9+.-]+://")
_SHARD_NAME = re.compile(r"[^/\s'\"=]+\.(?:tar(?:\.gz|\.bz2|\.xz)?|tgz)(?=$|[\s'\"?#;|&)])", re.IGNORECASE)


def is_remote(spec: str) -> bool:
    """Whether a spec is to be opened by a command or over a network, and not as a path."""
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
