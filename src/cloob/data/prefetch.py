"""Has what will be read soon made in the background."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from cloob.errors import InputError

_REMEMBERED = 64


class Prefetcher:
    """A thread that gets the shards that will be needed next, one at a time; a forked process has one of its own.

    Args:
        get: Called with the number of a shard; it has to be safe beside the reading thread. What it raises is dropped:
            whoever reads the shard meets the same failure.
    """

    def __init__(self, get: Callable[[int], object]) -> None:
        self._get = get
        self._pid = 0

    def want(self, shards: Iterable[int]) -> None:
        """Asks for shards, but for those that were asked for just before."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
            self._asked: OrderedDict[int, None] = OrderedDict()
            # A daemon: the end of the program does not wait for a download.
            threading.Thread(target=self._run, name="cloob-prefetch", daemon=True).start()
        for shard in shards:
            if shard not in self._asked:
                self._wanted.put(shard)
            self._asked[shard] = None
            self._asked.move_to_end(shard)
            if len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(InputError, OSError):
                self._get(self._wanted.get())
