"""The run folder before the first step: no two runs are mixed up in it, and one process at a time writes to it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cloob.errors import InputError, TrainingFailed, require
from cloob.models.load import find_model_folder
from cloob.models.runs import (
    AVERAGED_FOLDER,
    CHECKPOINTS_FOLDER,
    EPOCHS_FILE,
    METRICS_FILE,
    PROFILE_FOLDER,
    RUN_CONFIG_FILE,
    SKIPPED_FILE,
    list_checkpoints,
)
from cloob.training.config import TrainConfig
from cloob.training.state.checkpoint import set_aside
from cloob.training.state.resume import Checkpoint

LOCK = ".lock"
LEASE_SECONDS, HEARTBEAT_SECONDS = 60.0, 2.0
_RUN_FILES = (RUN_CONFIG_FILE, METRICS_FILE, EPOCHS_FILE, SKIPPED_FILE, CHECKPOINTS_FOLDER)


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


def refuse_another_run(config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Refuses a run folder that holds a run which is neither resumed nor to be replaced."""
    save, held = config.save, _held_files(config.save.out)
    if not held:
        return
    if save.overwrite:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:  # a rank has died: this is the run itself
            raise InputError(
                f"{save.out}: holds the run that torchrun has started again, which --overwrite would remove; "
                "give --resume auto in its place"
            )
        for key in ("init", "init_image"):
            spec = getattr(config.towers, key)
            folder = find_model_folder(spec) if spec is not None else None
            if folder is not None and folder.resolve().is_relative_to(save.out.resolve()):
                raise InputError(
                    f"{key} {spec!r} lies in {save.out}, which --overwrite would remove; give another --out"
                )
    elif save.resume != "auto" and not (checkpoint is not None and _is_of(checkpoint, save.out)):
        raise InputError(
            f"{save.out}: already holds a run; go on with --resume auto, or give --overwrite or another --out"
        )


def _is_of(checkpoint: Checkpoint, out: Path) -> bool:
    return checkpoint.path.parent.parent.resolve() == out.resolve()


def _held_files(out: Path) -> list[Path]:
    """The files of a run that a folder holds."""
    return [out / name for name in _RUN_FILES if (out / name).exists()]


def prepare_run_folder(config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Makes the run folder; an earlier run is removed, and checkpoints after the one that is resumed are set aside."""
    out, save = config.save.out, config.save
    if checkpoint is not None and _is_of(checkpoint, out):
        newest = list_checkpoints(out)[-1]
        asked = save.resume != "auto" and Path(save.resume).resolve() != out.resolve()  # for this checkpoint
        if asked and newest.name > checkpoint.path.name:
            raise InputError(
                f"{out}: holds {newest.name}, which is newer than {checkpoint.path.name}; "
                f"resume that one, or into another --out"
            )
        set_aside(checkpoint.path)
    try:
        if save.overwrite:
            beside = [out / name for name in ("tensorboard", AVERAGED_FOLDER, PROFILE_FOLDER, "results.json")]
            for path in [*_held_files(out), *out.glob("nonfinite-step-*.json"), *beside]:
                folder = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if folder else path.unlink(missing_ok=True)
        (out / CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: the run folder cannot be written ({error.strerror or error})") from None
