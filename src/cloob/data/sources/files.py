"""Rows in files that are prepared before they are read, such as fetched or unpacked."""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from cloob.errors import InputError, one_line

T = TypeVar("T")

_DOWNLOADS = 2  # at the same time, by every process
_ATTEMPTS = 3  # to open a file that other processes may remove from the cache
# what the cache has removed, or has no room for
_LOST = (errno.ENOENT, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def reading(path: Path, *faults: type[Exception]) -> Iterator[None]:
    """Inside, what is wrong with a file is one line for the user; what is wrong with
    the cache stays an OSError.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowException, *faults) as error:
        if not path.exists():
            raise InputError(f"{path}: no such file") from None
        if getattr(error, "errno", None) in _LOST:
            raise
        hint = ""
        if '"' in str(error):
            hint = "; a quote that is not closed takes in the rows after it"
        kind = path.suffix[1:].lower()
        raise InputError(
            f"{path} cannot be read as {kind}: {one_line(error)}{hint}"
        ) from error


class _Prefetcher:
    """Threads that prepare files; failures show when a row is read."""

    def __init__(self, prepare: Callable[[int], object]) -> None:
        self._prepare = prepare
        self._requests: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._latest: deque[int] = deque(maxlen=64)
        for _ in range(_DOWNLOADS):
            # a daemon: the end of the program does not wait for it
            threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def request(self, shards: Sequence[int]) -> None:
        for shard in shards:
            if shard not in self._latest:
                self._latest.append(shard)
                self._requests.put(shard)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(InputError, OSError):
                self._prepare(self._requests.get())


@dataclass
class _Opened(Generic[T]):
    """What one process has open of a source; another one, to which the source is
    pickled, begins anew.
    """

    files: OrderedDict[int, T] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    prefetcher: _Prefetcher | None = None

    def __reduce__(self) -> tuple[type[_Opened[T]], tuple[()]]:
        return _Opened, ()


class FileSource(ABC, Generic[T]):
    """Rows in files, each of which is prepared when its first row is read; ``streamed``
    is whether that is costly.
    """

    max_open = 32  # of a streamed source

    def __init__(
        self, name: str, shard_sizes: Iterable[int], *, streamed: bool
    ) -> None:
        self.name = name
        self.streamed = streamed
        self._opened = _Opened[T]()
        self.resize(shard_sizes)

    def resize(self, shard_sizes: Iterable[int]) -> None:
        """Notes how many rows every file has."""
        self.shard_sizes = tuple(shard_sizes)
        self._ends = np.cumsum(self.shard_sizes)
        self.starts = self._ends - self.shard_sizes

    @abstractmethod
    def prepare(self, shard: int) -> Path:
        """A local file of this shard that can be read in place."""

    @abstractmethod
    def load(self, shard: int, file: Path) -> T:
        """Opens a prepared file; raises FileNotFoundError where it is gone again."""

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def place(self, index: int) -> tuple[int, int]:
        """The shard of a row, and its number there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self.starts[shard])

    def opened(self, shard: int) -> T:
        """The content of a shard, prepared where it is not open."""
        files = self._opened.files
        with self._opened.lock:
            if shard not in files:
                files[shard] = self._loaded(shard)
                if self.streamed and len(files) > self.max_open:
                    files.popitem(last=False)
            files.move_to_end(shard)
            return files[shard]

    def _loaded(self, shard: int) -> T:
        for _ in range(_ATTEMPTS - 1):
            # another process has made room in between
            with contextlib.suppress(FileNotFoundError):
                return self.load(shard, self.prepare(shard))
        return self.load(shard, self.prepare(shard))

    def prefetch(self, indices: np.ndarray) -> None:
        """Has the files of these rows prepared in the background."""
        if self._opened.prefetcher is None:
            self._opened.prefetcher = _Prefetcher(self.prepare)
        shards = np.unique(np.searchsorted(self._ends, indices, side="right"))
        self._opened.prefetcher.request(shards.tolist())
