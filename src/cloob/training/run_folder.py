"""The run folder before the first step: no two runs are mixed up in it, and one process at a time writes to it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cloob.errors import InputError, TrainingFailed, require
from cloob.models import runs
from cloob.models.load import find_model_folder
from cloob.training.config import TrainConfig
from cloob.training.config.checks import wrong

LOCK = ".lock"
LEASE_SECONDS, HEARTBEAT_SECONDS = 60.0, 2.0
_RUN_FILES = (runs.RUN_CONFIG_FILE, runs.METRICS_FILE, runs.EPOCHS_FILE, runs.SKIPPED_FILE, runs.CHECKPOINTS_FOLDER)
_PRODUCTS = (
    *("tensorboard", "results.json", "suspects.csv", "nonfinite-step-*.json"),
    *(runs.AVERAGED_FOLDER, runs.MEMBERS_FOLDER, runs.OBJECTIVES_FILE),
)


@contextlib.contextmanager
def hold(run: Path) -> Iterator[Callable[[], None]]:
    """Holds a run folder, which is made if it is missing; yields a check that raises once another process has it.

    The lock works on a network file system, too. A dead process of this host is passed over at once, one of another
    host after a minute without a heartbeat.
    """
    library = require("filelock", "train")
    lock = library.SoftFileLease(run / LOCK, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS)

    def beat() -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return (run / LOCK).stat().st_mtime_ns
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
        lock.acquire(timeout=LEASE_SECONDS + 5, cancel_check=lambda: beat() not in (before, None))
    except OSError as error:
        why = f"the run folder cannot be written ({error.strerror})"
        if isinstance(error, library.Timeout):
            why = f"{_name(lock.owner)} is writing this run; wait for it, stop it, or give another --out"
        raise InputError(f"{run}: {why}") from None
    try:
        yield check
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # not empty: then it stays
            run.rmdir()


def _name(owner: Any) -> str:
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"


def refuse_another_run(config: TrainConfig, checkpoint: Path | None) -> None:
    """Refuses a run folder that holds a run which is neither resumed nor to be replaced."""
    save, out, init = config.save, config.save.out, config.towers.init
    if not any((out / name).exists() for name in _RUN_FILES):
        return
    if not save.overwrite:
        if save.resume != "auto" and not _is_of(checkpoint, out):
            wrong(f"{out}: already holds a run; go on with --resume auto, or give --overwrite or another --out")
        return
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # a rank has died: it is the run itself
        itself = f"{out}: holds the run that torchrun has started again, which --overwrite would remove"
        wrong(f"{itself}; give --resume auto in its place")
    folder = find_model_folder(init) if init is not None else None
    if folder is not None and folder.resolve().is_relative_to(out.resolve()):
        wrong(f"init {init!r} lies in {out}, which --overwrite would remove; give another --out")


def _is_of(checkpoint: Path | None, out: Path) -> bool:
    return checkpoint is not None and checkpoint.parent.parent.resolve() == out.resolve()


def prepare_run_folder(config: TrainConfig, checkpoint: Path | None) -> None:
    """Makes the run folder; an earlier run is removed, and unreadable checkpoints after the resumed one set aside."""
    out, save = config.save.out, config.save
    if checkpoint is not None and _is_of(checkpoint, out):
        later = [path for path in runs.list_checkpoints(out) if path.name > checkpoint.name]
        if later and save.resume != "auto" and Path(save.resume).resolve() != out.resolve():
            wrong(f"{out}: holds a checkpoint newer than {checkpoint.name}; resume that one, or into another --out")
        for path in later:  # they must not count as the newest
            aside = path.with_name(f"unreadable-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    stale = () if config.pairs.val_split else (runs.HELD_OUT_FILE,)  # else it was written a moment ago
    for pattern in (*_RUN_FILES, *_PRODUCTS, *stale) if save.overwrite else ():
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / runs.CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
