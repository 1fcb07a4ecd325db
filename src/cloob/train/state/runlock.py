"""One process at a time writes to a run folder: a lock file that says which, and that a later process may take over.

The file holds host, process and start of its owner, who renews the file's time while it lives. On the owner's own
machine the process tells whether the lock still counts. From elsewhere (a run folder on a network file system) only the
time does: a lock that was not renewed for a minute, by the file server's clock, is of a process that is gone. File
locks of the kernel are not used: over NFS, FUSE and Lustre they are refused, or taken on one host alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from cloob.errors import InputError, TrainingFailed

NAME = ".lock"
_RENEWED_EVERY = 10.0
_DEAD_AFTER = 60.0
_MOMENT = 0.05


@dataclass(frozen=True)
class Owner:
    """The process that holds a run.

    Attributes:
        host: Its host's name.
        pid: Its number there.
        started: When it began, in the kernel's ticks: a number is given to another process later.
        machine: The boot of the machine and the space of process numbers that it lives in.
        token: Of this lock alone.
    """

    host: str
    pid: int
    started: str
    machine: str
    token: str


class RunLock:
    """Holds a run folder, which is made if it is missing, and unmade if nothing was written to it.

    Args:
        run: The run folder.

    Raises:
        InputError: On entry: another process holds it, or the folder cannot be written.
        TrainingFailed: By ``check``: another process took it over.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self._owner = Owner(socket.gethostname(), os.getpid(), _started(os.getpid()), _machine(), uuid.uuid4().hex)
        self._made: list[Path] = []
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        run = self.path.parent
        self._made = [folder for folder in (run, *run.parents) if not folder.exists()]
        try:
            run.mkdir(parents=True, exist_ok=True)
            while not self._create():
                refuse_held(run)
                _remove_stale(self.path)
        except OSError as error:
            raise InputError(f"{run}: the run folder cannot be written ({error.strerror})") from None
        threading.Thread(target=self._renew, name="cloob-run-lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if _owner(self.path) == self._owner:
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: then they stay
            for folder in self._made:
                folder.rmdir()

    def check(self) -> None:
        """Looks whether this process still holds the run, before it writes something that another one would miss.

        Raises:
            TrainingFailed: It does not: it stood still for so long that it was taken for dead.
        """
        owner = _owner(self.path)
        if owner != self._owner:
            who = f"process {owner.pid} on {owner.host}" if owner else "somebody"
            raise TrainingFailed(
                f"{self.path.parent}: {who} took the run over while this process stood still; nothing more is written"
            )

    def _create(self) -> bool:
        """Makes the lock file; False where there is one."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps(asdict(self._owner)).encode())
        except OSError:  # a full disk
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWED_EVERY):
            with contextlib.suppress(OSError):  # a disk that is away for a while; check() sees whether it was taken
                os.utime(self.path)


def refuse_held(run: Path) -> None:
    """Refuses a run folder that a living process holds; names host and process."""
    path = run / NAME
    owner = _owner(path)
    if owner is None or not _alive(path, owner):
        return
    raise InputError(
        f"{run}: process {owner.pid} on {owner.host} is writing this run; wait for it, stop it, or give another --out"
    )


def _owner(path: Path) -> Owner | None:
    """Who a lock file names; None when there is none, or it was cut short as it was written."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _alive(path: Path, owner: Owner) -> bool:
    if (owner.host, owner.machine) == (socket.gethostname(), _machine()):
        return _started(owner.pid) == owner.started
    return _fresh(path)


def _fresh(path: Path) -> bool:
    """Whether a lock was made or renewed a short time ago."""
    try:
        return _now(path.parent) - path.stat().st_mtime < _DEAD_AFTER
    except FileNotFoundError:
        return False


def _now(folder: Path) -> float:
    """The time of the file server, which may not be this machine's."""
    probe = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Takes a dead process's lock away; one that another process has put there in between is put back.

    A lock that names nobody may be one that is being written: it is left for a moment, and for a minute in all.
    """
    stale = _owner(path)
    if stale is None and _fresh(path):
        time.sleep(_MOMENT)
        return
    aside = path.with_name(f"{NAME}-{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _owner(aside) == stale:
        aside.unlink()
    else:
        aside.rename(path)


def _started(pid: int) -> str:
    """When a process began, as the kernel counts; empty when there is none, or it is dead and not yet collected."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "running"


def _machine() -> str:
    """This boot of this machine, and its space of process numbers: containers of one host have their own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""
