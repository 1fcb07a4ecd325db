"""Rows in files that are prepared before they are read: a shard is fetched, a Parquet file unpacked into the cache."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from cloob.errors import InputError

T = TypeVar("T")

_MAX_OPEN_FILES = 32  # of a streamed source
_REMEMBERED = 64  # files that were asked for


class _Prefetcher:
    """A thread that prepares the files that will be needed next, one at a time; a forked process has one of its own.

    What ``prepare`` raises is dropped: whoever reads the file meets the same failure.
    """

    def __init__(self, prepare: Callable[[int], object]) -> None:
        self._prepare = prepare
        self._pid = 0

    def want(self, shards: Iterable[int]) -> None:
        """Asks for files, but for those that were asked for just before."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
            self._asked: deque[int] = deque(maxlen=_REMEMBERED)
            # A daemon: the end of the program does not wait for a download.
            threading.Thread(target=self._run, name="cloob-prefetch", daemon=True).start()
        for shard in shards:
            if shard not in self._asked:
                self._wanted.put(shard)
                self._asked.append(shard)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(InputError, OSError):
                self._prepare(self._wanted.get())


class FileSource(ABC, Generic[T]):
    """Rows in files, each of which is prepared when its first row is read, and stays open for a while.

    A subclass says how a file is prepared and opened; ``streamed`` is whether that is costly.
    """

    def __init__(self, name: str, shard_sizes: Sequence[int], *, streamed: bool) -> None:
        self.name = name
        self.shard_sizes = tuple(shard_sizes)
        self.streamed = streamed
        self._forget()

    def _forget(self) -> None:
        self._ends = np.cumsum(self.shard_sizes)
        self._opened: OrderedDict[int, T] = OrderedDict()
        self._lock = threading.Lock()
        self._prefetcher = _Prefetcher(self.prepare)

    @abstractmethod
    def prepare(self, shard: int) -> Path:
        """A local file of this shard that can be read in place."""

    @abstractmethod
    def load(self, shard: int, file: Path) -> T:
        """Opens a prepared file; raises FileNotFoundError where it is gone again."""

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, index: int) -> tuple[int, int]:
        """The file of a row, and its number there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shard_sizes[shard]

    def opened(self, shard: int) -> T:
        """A file, prepared and opened now if it is not open."""
        with self._lock:
            if shard not in self._opened:
                for last in (False, False, True):
                    try:
                        self._opened[shard] = self.load(shard, self.prepare(shard))
                        break
                    except FileNotFoundError:  # another process has made room in between
                        if last:
                            raise
                if self.streamed and len(self._opened) > _MAX_OPEN_FILES:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(shard)
            return self._opened[shard]

    def prefetch(self, indices: np.ndarray) -> None:
        """Has the files of these rows prepared in the background; failures show when a row is read."""
        self._prefetcher.want(np.unique(np.searchsorted(self._ends, indices, side="right")).tolist())

    def __getstate__(self) -> dict[str, Any]:
        own = ("_ends", "_opened", "_lock", "_prefetcher")
        return {key: value for key, value in vars(self).items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()
