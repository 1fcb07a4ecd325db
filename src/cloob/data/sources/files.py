"""Rows in files that are prepared before they are read: a shard is fetched, a Parquet file unpacked into the cache."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from cloob.errors import InputError, one_line

T = TypeVar("T")

_FAILED_SECONDS = 60.0  # for which a file that could not be opened is not tried again: each of its rows would wait
_DOWNLOADS = 2  # at the same time, by each process
_LOST = (errno.ENOENT, errno.ENOSPC, errno.EDQUOT)  # what the cache has removed, or has no room for


@contextlib.contextmanager
def reading(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Inside, what is wrong with a file is one line for the user; what is wrong with the cache stays an OSError."""
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException, *more) as error:
        if isinstance(error, InputError) or (getattr(error, "errno", None) in _LOST and path.exists()):
            raise
        if not path.exists():
            raise InputError(f"{path}: no such file") from None
        hint = "; a quote that is not closed takes in the rows after it" if '"' in str(error) else ""
        raise InputError(f"{path} cannot be read as {path.suffix[1:].lower()}: {one_line(error)}{hint}") from error


class FileSource(ABC, Generic[T]):
    """Rows in files. Each is prepared when its first row is read; ``streamed`` is whether that is costly."""

    max_open = 32  # of a streamed source

    def __init__(self, name: str, shard_sizes: Sequence[int], *, streamed: bool) -> None:
        self.name = name
        self.shard_sizes = tuple(shard_sizes)
        self.streamed = streamed
        self._ends = np.cumsum(self.shard_sizes)
        self._begin()

    def _begin(self) -> None:
        """What each process has for itself."""
        self._opened: OrderedDict[int, T] = OrderedDict()
        self._failed: dict[int, tuple[float, Exception]] = {}  # until when it is not tried again, and why
        self._lock = threading.Lock()
        self._prefetching = 0  # the process whose threads prepare files

    @abstractmethod
    def prepare(self, shard: int) -> Path:
        """A local file of this shard that can be read in place."""

    @abstractmethod
    def load(self, shard: int, file: Path) -> T:
        """Opens a prepared file; raises FileNotFoundError where it is gone again."""

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shard_sizes[shard]

    def opened(self, shard: int) -> T:
        with self._lock:
            if shard not in self._opened:
                until, error = self._failed.get(shard, (0.0, None))
                if time.monotonic() > until:
                    error = self._open(shard)
                if error is not None:
                    raise error
                if self.streamed and len(self._opened) > self.max_open:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(shard)
            return self._opened[shard]

    def _open(self, shard: int, attempts: int = 3) -> Exception | None:
        """Opens a file; returns why it cannot be opened."""
        try:
            self._opened[shard] = self.load(shard, self.prepare(shard))
        except (OSError, InputError) as error:
            if isinstance(error, FileNotFoundError) and attempts > 1:  # another process has made room in between
                return self._open(shard, attempts - 1)
            self._failed[shard] = time.monotonic() + _FAILED_SECONDS, error
            return error
        return None

    def prefetch(self, indices: np.ndarray) -> None:
        """Has the files of these rows prepared in the background; failures show when a row is read."""
        if self._prefetching != os.getpid():  # a forked process has threads of its own
            self._prefetching = os.getpid()
            self._requests: queue.SimpleQueue[int] = queue.SimpleQueue()
            self._requested: list[int] = []
            for _ in range(_DOWNLOADS):  # daemons: the end of the program does not wait for them
                threading.Thread(target=self._prepare_requested, name="cloob-prefetch", daemon=True).start()
        for shard in np.unique(np.searchsorted(self._ends, indices, side="right")).tolist():
            if shard not in self._requested:
                self._requests.put(shard)
                self._requested = [*self._requested[-63:], shard]

    def _prepare_requested(self) -> None:
        while True:
            with contextlib.suppress(InputError, OSError):
                self.prepare(self._requests.get())

    def __getstate__(self) -> dict[str, Any]:
        local = ("_opened", "_failed", "_lock", "_prefetching", "_requests", "_requested")
        return {key: value for key, value in vars(self).items() if key not in local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()
