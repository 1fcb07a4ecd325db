"""One process at a time writes to a run folder, also on a network file system; a dead one's lock is taken over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cloob.errors import InputError, TrainingFailed, require

NAME = ".lock"
_LEASE_SECONDS, _HEARTBEAT_SECONDS = 60.0, 2.0


@contextlib.contextmanager
def hold(run: Path) -> Iterator[Callable[[], None]]:
    """Holds a run folder, which is made if it is missing; yields a check that raises once another process has it.

    A dead process of this host is passed over at once, one of another host after a minute without a heartbeat.
    """
    library = require("filelock", "train")
    lock = library.SoftFileLease(run / NAME, lease_duration=_LEASE_SECONDS, heartbeat_interval=_HEARTBEAT_SECONDS)

    def beat() -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return (run / NAME).stat().st_mtime_ns
        return None

    def check() -> None:
        owner = lock.owner
        if owner is None or owner.token != lock.token:
            raise TrainingFailed(
                f"{run}: {_name(owner)} took the run over while this process stood still; nothing more is written"
            )

    try:
        run.mkdir(parents=True, exist_ok=True)
        before = beat()
        lock.acquire(timeout=_LEASE_SECONDS + 5, cancel_check=lambda: beat() not in (before, None))
    except library.Timeout:
        raise InputError(
            f"{run}: {_name(lock.owner)} is writing this run; wait for it, stop it, or give another --out"
        ) from None
    except OSError as error:
        raise InputError(f"{run}: the run folder cannot be written ({error.strerror})") from None
    try:
        yield check
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # not empty: then it stays
            run.rmdir()


def _name(owner: Any) -> str:
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"
