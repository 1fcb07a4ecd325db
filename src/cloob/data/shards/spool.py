"""A bounded folder of shards on this host: each is made once for all ranks and workers, the least used goes first."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cloob.cache import cache_root, locked, private_folder
from cloob.errors import InputError

logger = logging.getLogger(__name__)
DEFAULT_CACHE_BYTES = 50 * 1024**3
INDEX_SUFFIX = ".index"

_TEMPORARY = ".tmp-"
# What get() may have written; a folder that holds something else keeps it.
_OWN = re.compile(r"[0-9a-f]{24}-|\.tmp-[0-9a-f]{24}-")
_STALE_SECONDS = 24 * 3600
_IN_USE_SECONDS = 30
_REMEMBERED = 64


@dataclass(frozen=True)
class ShardCache:
    """Files that are made when they are first needed, and kept as long as there is room.

    Several processes share a folder: a file is made by one of them, the others wait. What another process has open is
    removed under its hands without harm (on POSIX), so the disk may hold a little more than ``max_bytes`` for a while;
    one file is always kept, whatever its size.

    Args:
        folder: Made when it is missing; None: ``shards`` in ``cache_root()``.
        max_bytes: Room for the files together.
    """

    folder: Path | None = None
    max_bytes: int = DEFAULT_CACHE_BYTES

    def get(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file of this name, made now if it is not there.

        Args:
            name: What identifies the content, e.g. its URL.
            make: Writes the content to the path that it is given.

        Raises:
            InputError: The folder cannot be written, or the disk is full.
        """
        try:
            folder = self._folder()
            digest = hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
            tail = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-60:]
            path = folder / f"{digest}-{tail}"
            if touch(path):
                return path
            with locked(folder / f"lock-{digest[:2]}", lambda: _unfinished(folder, digest[:2])):
                if touch(path):
                    return path
                temporary = folder / f"{_TEMPORARY}{digest}-{os.getpid()}-{threading.get_ident()}"
                try:
                    make(temporary)
                    with temporary.open("rb") as file:
                        os.fsync(file.fileno())
                    temporary.replace(path)
                finally:
                    temporary.unlink(missing_ok=True)
            self._evict(folder, path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "lower --cache-gb, or choose another --cache-dir" if full else "choose another --cache-dir"
            raise InputError(f"{self.folder or cache_root()}: cannot keep shards ({error.strerror}); {hint}") from error
        return path

    def drop(self, path: Path) -> None:
        """Removes a file that turned out to be of no use."""
        for each in (path, _index(path)):
            each.unlink(missing_ok=True)

    def _folder(self) -> Path:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder
        folder = cache_root() / "shards"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = private_folder()
        return folder

    def _evict(self, folder: Path, kept: Path) -> None:
        with locked(folder / "lock-evict"):
            now, total = time.time(), 0
            entries: list[tuple[float, int, Path]] = []
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    stat, path = entry.stat(), Path(entry.path)
                    if not _OWN.match(entry.name) or not entry.is_file():
                        continue
                    if entry.name.startswith(_TEMPORARY):
                        if now - stat.st_mtime > _STALE_SECONDS:
                            path.unlink()
                    elif path.suffix != INDEX_SUFFIX:
                        total += stat.st_size
                        entries.append((stat.st_atime, stat.st_size, path))
            for used, size, path in sorted(entries):
                if total <= self.max_bytes:
                    break
                if path == kept:
                    continue
                if now - used < _IN_USE_SECONDS:
                    _warn_once(
                        f"{folder}: {self.max_bytes / 1024**3:.3g} GiB do not hold the shards that are read at the "
                        "same time; they are fetched again and again: raise --cache-gb"
                    )
                self.drop(path)
                total -= size


class Ahead:
    """A thread that gets the shards that will be needed next, one at a time.

    Args:
        get: Called with the number of a shard; it has to be safe beside the reading thread. What it raises is dropped:
            whoever reads the shard meets the same failure.
    """

    def __init__(self, get: Callable[[int], object]) -> None:
        self._get = get
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._asked: OrderedDict[int, None] = OrderedDict()
        # A daemon: the end of the program does not wait for a download.
        threading.Thread(target=self._run, name="cloob-prefetch", daemon=True).start()

    def want(self, shard: int) -> None:
        """Asks for a shard, unless it was asked for just before."""
        if shard in self._asked:
            self._asked.move_to_end(shard)
            return
        self._asked[shard] = None
        if len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)
        self._wanted.put(shard)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(InputError, OSError):
                self._get(self._wanted.get())


def touch(path: Path) -> bool:
    """Notes that a file is in use; False when it is not there."""
    try:
        # The access time is set by hand: many file systems do not, and the modification time is the index's key.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    except PermissionError:
        return path.is_file()
    return True


def _unfinished(folder: Path, start: str) -> list[tuple[str, int, int]]:
    """What is being made under one lock, and how far it is."""
    found = []
    for path in sorted(folder.glob(f"{_TEMPORARY}{start}*")):
        with contextlib.suppress(FileNotFoundError):
            found.append((path.name, (stat := path.stat()).st_size, stat.st_mtime_ns))
    return found


def _index(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)
