"""The cache of what this package can make again, which any number of processes share.

Above its size what was used longest ago goes; never ``weights/``, ``addresses/``
and ``photos/``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from cloob.errors import InputError, require

Contents = Literal["shards", "tables", "indices", "embeddings", "features"]
"""Fetched and unpacked tars; Parquet as Arrow; where samples lie in local tars; and
what models make of pictures and texts (two kinds).
"""

DEFAULT_BYTES = 50 * 1024**3

_STREAMED = "shards"  # read in turn: whatever room there is has to do
# since its last use, in which nothing else is removed: another run may be about to read
# it
_YOUNG_SECONDS = 3600
_TEMPORARY = ".tmp-"
# what a cache writes; other files in its folder stay
_CACHED = re.compile(r"[0-9a-f]{24}-|\.tmp-[0-9a-f]{24}-")


def cache_root() -> Path:
    """Where this package keeps what it can make again: ``$CLOOB_CACHE``, else ``cloob``
    in the user's cache folder.
    """
    root = os.environ.get("CLOOB_CACHE")
    if root:
        return Path(root)
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(caches) / "cloob"
    except RuntimeError as error:
        # a user without an entry and without HOME, as in a container
        raise InputError(
            f"no folder for the cache ({error}); set CLOOB_CACHE or HOME"
        ) from error


def usual_bytes() -> int:
    """What the cache keeps at most: ``$CLOOB_CACHE_BYTES``, else 50 GiB."""
    text = os.environ.get("CLOOB_CACHE_BYTES", "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise InputError(
            f"CLOOB_CACHE_BYTES is {text!r}; it takes a number of bytes, such as"
            f" {DEFAULT_BYTES}"
        )
    return int(text or DEFAULT_BYTES)


def locked(path: Path) -> contextlib.AbstractContextManager[object]:
    """Takes a lock file, which saves double work; threads wait too."""
    lock: contextlib.AbstractContextManager[object]
    lock = require("filelock", "train").FileLock(
        path, thread_local=False, is_singleton=False
    )
    return lock


class _Usage(NamedTuple):
    """When a file was used last, seconds since 1970, and its bytes."""

    used: float
    size: int
    path: Path


def _usage(root: Path, now: float) -> tuple[list[_Usage], list[Path]]:
    """The files of a cache, and what killed processes left."""
    usage: list[_Usage] = []
    leftovers: list[Path] = []
    for kind in get_args(Contents):
        for path in (root / kind).glob("*"):
            if not _CACHED.match(path.name):
                continue
            # removed, or given its name, in between
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if not path.name.startswith(_TEMPORARY):
                    usage.append(_Usage(stat.st_atime, stat.st_size, path))
                elif now - stat.st_mtime > _YOUNG_SECONDS:
                    leftovers.append(path)
    return usage, leftovers


@dataclass(frozen=True)
class Cache:
    """Files by kind and name; by default in ``cache_root()``, up to
    ``$CLOOB_CACHE_BYTES`` or ``DEFAULT_BYTES``.
    """

    folder: Path | None = None
    max_bytes: int = field(default_factory=usual_bytes)

    def get(self, kind: Contents, name: str, make: Callable[[Path], object]) -> Path:
        """The file of this name, e.g. a URL; one process makes it where it is missing,
        and the others wait.
        """
        with self._writing(kind, name) as path:
            if not touch(path):
                with locked(path.with_name(f"lock-{path.name[:2]}")):
                    if not touch(path):
                        make_whole(path, make)
                self.evict(keep=path)
            return path

    def find(self, kind: Contents, name: str) -> Path | None:
        """The file of this name, noted as in use; None when it is not there."""
        with contextlib.suppress(OSError):
            path = self._path(kind, name)
            return path if touch(path) else None
        return None

    def named(self, kind: Contents, part: str) -> list[Path]:
        """The files of a kind that have ``part`` in the last 60 characters of their
        names, noted as in use.
        """
        with contextlib.suppress(OSError):
            paths = sorted((self._root() / kind).glob(f"*{part}*"))
            return [
                path
                for path in paths
                if not path.name.startswith(_TEMPORARY) and touch(path)
            ]
        return []

    def put(self, kind: Contents, name: str, content: bytes) -> Path:
        """Writes the file of this name, in place of one that is there."""
        with self._writing(kind, name) as path:
            make_whole(path, lambda temporary: temporary.write_bytes(content))
            self.evict(keep=path)
            return path

    def evict(self, keep: Path | None = None) -> list[Path]:
        """Removes what was used longest ago, but not ``keep``, and what killed
        processes left; returns it in order.
        """
        root, now = self._root(), time.time()
        with locked(root / "lock-evict"):
            usage, removed = _usage(root, now)
            excess = sum(file.size for file in usage) - self.max_bytes
            for file in sorted(usage):
                if excess <= 0:
                    break
                age = now - file.used
                is_streamed = file.path.parent.name == _STREAMED
                if file.path == keep or (age < _YOUNG_SECONDS and not is_streamed):
                    continue
                removed.append(file.path)
                excess -= file.size
            for path in removed:
                path.unlink(missing_ok=True)
        return removed

    def _root(self) -> Path:
        root = self.folder or cache_root()
        root.mkdir(parents=True, exist_ok=True)
        return root

    def _path(self, kind: Contents, name: str) -> Path:
        content = name.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(content, digest_size=12).hexdigest()
        words = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
        return self._root() / kind / f"{digest}-{words[-60:]}"

    @contextlib.contextmanager
    def _writing(self, kind: Contents, name: str) -> Iterator[Path]:
        """Inside, a file of the cache is written to the path that this gives; an error
        of the disk is one line.
        """
        try:
            path = self._path(kind, name)
            path.parent.mkdir(exist_ok=True)
            yield path
        except OSError as error:
            hint = "name another folder by $CLOOB_CACHE"
            raise InputError(
                f"{self.folder or cache_root()}: cannot keep {kind} ({error.strerror});"
                f" {hint}"
            ) from error


def touch(path: Path) -> bool:
    """Notes that a file is in use; False where there is none."""
    with contextlib.suppress(FileNotFoundError):
        modified = path.stat().st_mtime_ns  # the index's key, which stays
        with contextlib.suppress(OSError):  # somebody else's, or read-only
            os.utime(path, ns=(time.time_ns(), modified))
        return True
    return False


def make_whole(path: Path, make: Callable[[Path], object]) -> None:
    """Makes a file under another name, and renames it when it is complete and on the
    disk.
    """
    temporary = path.with_name(
        f"{_TEMPORARY}{path.name}-{os.getpid()}-{threading.get_ident()}"
    )
    try:
        make(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
