"""Where this package keeps what it can make again, and the locks by which processes share it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cloob.errors import require


def cache_root() -> Path:
    """Where this package keeps what it can make again: ``$CLOOB_CACHE``, else ``cloob`` in the user's cache folder."""
    if root := os.environ.get("CLOOB_CACHE"):
        return Path(root)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cloob"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"cloob-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file against every other process of this host; threads of one process wait for each other too."""
    # Its own object each time: filelock's are re-entrant, which would let two threads in at once.
    with require("filelock", "train").FileLock(path, thread_local=False, is_singleton=False):
        yield
