"""The connections of threads to one file: each thread has its own, and takes it along when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from weakref import WeakSet

from cloob.search.sqlite.file import BeingWritten, Connection, connect, one_line

T = TypeVar("T")
_PAUSES = (0.0, 0.1, 0.5)  # seconds before a file that was written meanwhile is looked at again


class _Own:
    """The connection of a thread, which is closed with the thread."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __del__(self) -> None:
        self.connection.close()


class Connections:
    """Opens a connection for each thread that asks, see :func:`cloob.search.sqlite.file.connect`."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Opens the first one.

        Raises:
            InputError: As ``connect``.
        """
        self._path = path
        self._writable = writable
        self._threads = threading.local()
        self._opened: WeakSet[_Own] = WeakSet()
        self._lock = threading.Lock()
        self.look(lambda connection: None)

    def own(self) -> Connection:
        """This thread's."""
        own: _Own | None = getattr(self._threads, "own", None)
        if own is None:
            own = self._threads.own = _Own(connect(self._path, writable=self._writable))
            with self._lock:
                self._opened.add(own)
        return own.connection

    def look(self, work: Callable[[Connection], T]) -> T:
        """What ``work`` reads; read again, by another connection, where the file was written without a lock.

        Raises:
            InputError: What SQLite complains of, or the file is written again and again.
        """
        pauses = iter(_PAUSES)
        while True:
            try:
                connection = self.own()
                try:
                    with one_line(self._path):
                        found = work(connection)
                except Exception:
                    connection.check()  # it may be sound
                    raise
                connection.check()
                return found
            except BeingWritten:
                self._threads.own = None
                if (pause := next(pauses, None)) is None:
                    raise
                time.sleep(pause)

    def close(self) -> None:
        """Ends those of all threads."""
        with self._lock:
            for own in list(self._opened):
                own.connection.close()
            self._opened.clear()
        self._threads = threading.local()
