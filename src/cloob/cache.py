"""The one cache: what this package can make again, in one folder of one size, which any number of processes share.

A file appears under its name only when it is whole. Its name is made of what decides over its content. Whoever adds one
above the size, or to a full disk, removes what was used longest ago; that harms nobody who has it open (on POSIX), and
who looks for it makes it anew. So the folder may be deleted at any time.

Neither counted nor removed are ``weights/``, ``sizes/`` and ``addresses/`` in the same folder: public weights are large
and slow to fetch, an offline machine has them put there by hand, counts are small and cost a pass over all shards, and
what was typed here for an index only their user can say.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cloob.errors import InputError, require

logger = logging.getLogger(__name__)

Kind = Literal["shards", "tables", "indices", "embeddings", "features", "digests"]
"""Fetched and unpacked tars; Parquet as Arrow; where samples lie in local tars; what models make of pictures and texts
(two kinds); and fingerprints of models."""

DEFAULT_BYTES = 50 * 1024**3
INDEX_SUFFIX = ".index"
"""Of a file that goes with another one."""

_STREAMED = ("shards", "tables")  # read in turn: whatever room there is, it has to do
_YOUNG_SECONDS = 3600  # since its last use for which nothing else is removed: another run may be about to read it
_IN_USE_SECONDS = 30
_TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a cache may have written; a folder that holds something else keeps it.
_CACHED = re.compile(r"[0-9a-f]{24}-|\.tmp-[0-9a-f]{24}-")
# Longer than any fetch may stand still.
_PATIENCE_SECONDS = 900.0


def cache_root() -> Path:
    """Where this package keeps what it can make again: ``$CLOOB_CACHE``, else ``cloob`` in the user's cache folder."""
    if root := os.environ.get("CLOOB_CACHE"):
        return Path(root)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloob"
    except RuntimeError:  # a user without a home
        return private_folder()


def private_folder() -> Path:
    """A folder in the place for temporary files, where others may write too, that is this user's alone.

    Raises:
        InputError: Somebody else has made or can change it.
    """
    user = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / f"cloob-{'cache' if user is None else user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    stat = folder.lstat()
    if user is not None and (stat.st_uid != user or stat.st_mode & 0o022 or folder.is_symlink()):
        raise InputError(f"{folder}: is not yours alone, so what it holds is not trusted; set CLOOB_CACHE to a folder")
    return folder


@contextlib.contextmanager
def locked(path: Path, progress: Callable[[], object] = bool) -> Iterator[None]:
    """Holds a lock file against every other process of this host; threads of one process wait for each other too.

    It only saves double work: a holder that hangs or was stopped is passed over, with a warning.

    Args:
        path: The lock file.
        progress: Gives something else each time that the holder gets on; when it does not, patience ends.
    """
    library = require("filelock", "train")
    # Its own object each time: filelock's are re-entrant, which would let two threads in at once.
    lock = library.FileLock(path, thread_local=False, is_singleton=False)
    before = progress()
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS)
        except library.Timeout:
            now = progress()
            if now == before:
                logger.warning("%s: its holder has done nothing for %g s; going on without it", path, _PATIENCE_SECONDS)
                break
            before = now
    try:
        yield
    finally:
        lock.release()


def use_cache(folder: Path | None, gigabytes: float | None) -> None:
    """Puts a command's choice into the environment, where all of this process and those that it starts look."""
    if folder is not None:
        os.environ["CLOOB_CACHE"] = str(folder.absolute())
    if gigabytes is not None:
        os.environ["CLOOB_CACHE_BYTES"] = str(int(gigabytes * 1024**3))


@dataclass(frozen=True)
class Cache:
    """Files by kind and name, made when they are first needed and kept as long as there is room.

    One file is always kept, whatever its size. What another process has open still takes room after its removal, so the
    disk may hold a little more than ``max_bytes`` for a while.

    Args:
        folder: Made when it is missing; None: ``cache_root()``, or ``private_folder()`` where nobody has
            chosen one and the user's cannot be written.
        max_bytes: Room for the files together; None: ``$CLOOB_CACHE_BYTES``, else ``DEFAULT_BYTES``.

    Raises:
        InputError: ``$CLOOB_CACHE_BYTES`` is no number of bytes.
    """

    folder: Path | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_bytes is None:
            object.__setattr__(self, "max_bytes", _bytes_of_environment())

    def get(self, kind: Kind, name: str, make: Callable[[Path], None]) -> Path:
        """The file of this name, made now if it is not there; by one process, for which the others wait.

        Args:
            kind: What it is.
            name: What identifies the content, e.g. its URL.
            make: Writes the content to the path that it is given.

        Raises:
            InputError: The folder cannot be written, or the disk is full.
        """
        with self._writing(kind):
            return self._keep(self._path(kind, name), make)

    def find(self, kind: Kind, name: str) -> Path | None:
        """The file of this name, noted as in use; None when it is not there."""
        with contextlib.suppress(OSError):
            path = self._path(kind, name)
            return path if touch(path) else None
        return None

    def named(self, kind: Kind, part: str) -> list[Path]:
        """The files of a kind that have ``part`` in the last 60 characters of their names, noted as in use."""
        with contextlib.suppress(OSError):
            paths = sorted((self._root() / kind).glob(f"*{part}*"))
            return [path for path in paths if not path.name.startswith(_TEMPORARY) and touch(path)]
        return []

    def put(self, kind: Kind, name: str, content: bytes) -> Path:
        """Writes the file of this name, in place of one that is there; errors as of ``get``."""
        with self._writing(kind):
            path = self._path(kind, name)
            self._make(path, lambda temporary: temporary.write_bytes(content))
            self.evict(keep=path)
            return path

    def beside(self, path: Path, make: Callable[[Path], None]) -> Path:
        """The index of a cached file, which goes when that goes; made now if it is not there; errors as of ``get``."""
        with self._writing("indices"):
            return self._keep(_index(path), make)

    def drop(self, path: Path) -> None:
        """Removes a file that turned out to be of no use."""
        for file in (path, _index(path)):
            file.unlink(missing_ok=True)

    def evict(self, keep: Path | None = None, *, full: bool = False) -> list[Path]:
        """Removes what was used longest ago until there is no more than ``max_bytes``.

        What a process that was killed has left half written goes too.

        Args:
            keep: A file that stays in any case.
            full: The disk has no room left: half of what is kept goes, whatever ``max_bytes`` is, but nothing in use.

        Returns:
            What was removed, in order.
        """
        assert self.max_bytes is not None
        root, now = self._root(), time.time()
        with locked(root / "lock-evict"):
            entries = [entry for kind in get_args(Kind) for entry in _entries(root / kind)]
            removed = _drop_abandoned(entries, now)
            usage = _usage(entries)
            kept = sum(size for _, size in usage.values())
            excess = kept - (min(self.max_bytes, kept // 2) if full else self.max_bytes)
            for path, (used, size) in sorted(usage.items(), key=lambda item: item[1]):
                if excess <= 0:
                    break
                streamed = path.parent.name in _STREAMED
                if (keep and path == _owner(keep)) or (now - used < _YOUNG_SECONDS and not streamed):
                    continue
                if now - used < _IN_USE_SECONDS:
                    if full:
                        continue
                    _warn_once(
                        f"{root}: {self.max_bytes / 1024**3:.3g} GiB do not hold the shards that are read at the "
                        "same time; they are fetched again and again: raise --cache-gb"
                    )
                self.drop(path)
                removed.append(path)
                excess -= size
        return removed

    def _root(self) -> Path:
        root = self.folder or cache_root()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            if self.folder is not None or os.environ.get("CLOOB_CACHE"):
                raise
            root = private_folder()
        return root

    def _path(self, kind: Kind, name: str) -> Path:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        return self._root() / kind / f"{digest}-{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[-60:]}"

    def _keep(self, path: Path, make: Callable[[Path], None]) -> Path:
        if touch(path):
            return path
        path.parent.mkdir(exist_ok=True)
        bucket = path.name[:2]
        with locked(path.with_name(f"lock-{bucket}"), lambda: _unfinished(path.parent, bucket)):
            if touch(path):
                return path
            self._make(path, make)
        self.evict(keep=path)
        return path

    def _make(self, path: Path, make: Callable[[Path], object]) -> None:
        """Has a file made; once more where the disk was full and room could be made."""
        try:
            _write(path, make)
        except OSError as error:
            if error.errno not in _FULL or not self.evict(full=True):
                raise
            _write(path, make)

    @contextlib.contextmanager
    def _writing(self, kind: Kind) -> Iterator[None]:
        """What the disk complains of, as one line with the mend."""
        try:
            yield
        except OSError as error:
            room = "make room on its disk, or " if error.errno in _FULL else ""
            hint = f"{room}choose another --cache-dir or CLOOB_CACHE"
            raise InputError(f"{self.folder or cache_root()}: cannot keep {kind} ({error.strerror}); {hint}") from error


def touch(path: Path) -> bool:
    """Notes that a file is in use; False when it is not there."""
    try:
        # The access time is set by hand: many file systems do not, and the modification time is the index's key.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return path.is_file()
    return True


def _write(path: Path, make: Callable[[Path], object]) -> None:
    """Has a file made, which appears when it is whole."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-{threading.get_ident()}")
    path.parent.mkdir(exist_ok=True)
    try:
        make(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The files of a folder that a cache has written."""
    try:
        return [entry for entry in os.scandir(folder) if _CACHED.match(entry.name) and entry.is_file()]
    except FileNotFoundError:
        return []


def _drop_abandoned(entries: list[os.DirEntry[str]], now: float) -> list[Path]:
    """Removes what nobody has written to for long, and which has no name yet."""
    abandoned = []
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # given its name in between
            if entry.name.startswith(_TEMPORARY) and now - entry.stat().st_mtime > _YOUNG_SECONDS:
                Path(entry.path).unlink()
                abandoned.append(Path(entry.path))
    return abandoned


def _usage(entries: list[os.DirEntry[str]]) -> dict[Path, tuple[float, int]]:
    """When each whole file was last used, and how many bytes it has together with its index."""
    usage: dict[Path, tuple[float, int]] = {}
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # removed in between
            if not entry.name.startswith(_TEMPORARY):
                stat, owner = entry.stat(), _owner(Path(entry.path))
                used, size = usage.get(owner, (stat.st_atime, 0))
                usage[owner] = (stat.st_atime if entry.path == str(owner) else used, size + stat.st_size)
    return usage


def _unfinished(folder: Path, bucket: str) -> list[tuple[str, int, int]]:
    """What is being made under one lock, and how far it is."""
    growing = []
    for path in sorted(folder.glob(f"{_TEMPORARY}{bucket}*")):
        with contextlib.suppress(FileNotFoundError):
            growing.append((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns))
    return growing


def _index(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def _owner(path: Path) -> Path:
    """The file with which an index goes; any other file itself."""
    return path.with_name(path.name.removesuffix(INDEX_SUFFIX))


def _bytes_of_environment() -> int:
    text = os.environ.get("CLOOB_CACHE_BYTES", "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise InputError(f"CLOOB_CACHE_BYTES is {text!r}; a number of bytes is wanted, such as {DEFAULT_BYTES}")
    return int(text) if text else DEFAULT_BYTES


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
