"""Where this package keeps what it can make again, and the locks by which processes share it."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cloob.errors import InputError, require

logger = logging.getLogger(__name__)
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
