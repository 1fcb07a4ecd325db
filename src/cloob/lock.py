"""One process writes a run folder at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cloob.distributed import on_rank_zero, rank
from cloob.errors import InputError, TrainingFailed, require

LOCK = ".lock"
LEASE_SECONDS, HEARTBEAT_SECONDS = 60.0, 2.0


@contextlib.contextmanager
def lock_run_folder(run: Path) -> Iterator[Callable[[], None]]:
    """Locks a run folder, on rank 0 for all; yields a check that the lock still stands.

    A dead process's expires.
    """
    library = require("filelock", "train")
    lock = library.SoftFileLease(
        run / LOCK, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS
    )

    def beat() -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return (run / LOCK).stat().st_mtime_ns
        return None

    def name(owner: Any) -> str:
        if not owner:
            return "another process"
        return f"process {owner.pid} on {owner.hostname.partition('?')[0]}"

    def acquire() -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            before = beat()
            lock.acquire(
                timeout=LEASE_SECONDS + 5,
                cancel_check=lambda: beat() not in (before, None),
            )
        except OSError as error:
            why = f"the run folder cannot be written ({error.strerror})"
            if isinstance(error, library.Timeout):
                why = (
                    f"{name(lock.owner)} is writing this run; wait for it, stop it, or"
                    " give another --out"
                )
            raise InputError(f"{run}: {why}") from None

    def check() -> None:
        owner = lock.owner
        if owner is None or owner.token != lock.token:
            message = (
                f"{name(owner)} took the run over while this process stood still;"
                " nothing more is written"
            )
            raise TrainingFailed(f"{run}: {message}")

    on_rank_zero(acquire)
    try:
        yield lambda: on_rank_zero(check)
    finally:
        if rank() == 0:
            lock.release()
            with contextlib.suppress(OSError):  # not empty: then it stays
                run.rmdir()
