"""The run folder before the first step: one run and one writing process, and where a run is resumed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cloob.data.source import Fingerprint, differences
from cloob.distributed import on_rank_zero, rank, world_size
from cloob.errors import InputError, TrainingFailed, require
from cloob.models import runs
from cloob.models.load import find_model_folder
from cloob.training.callbacks import Ended, RunResult
from cloob.training.checkpoint import TRAINING, Checkpoint, load_objective, measured
from cloob.training.config import TrainConfig
from cloob.training.config.checks import wrong
from cloob.training.progress import Progress, is_whole

logger = logging.getLogger(__name__)

# Changing these between a run and its resumption changes no number of the training; batch_size has a line of its own.
_FREE_PARTS = ("save", "log")
_FREE = """workers val_data val_a val_b val_ids val_every cache_dir cache_gb device max_nonfinite patience
average_with_start batch_size given_held_out"""


def progress_of(
    checkpoint: Checkpoint, config: TrainConfig, data: Mapping[str, Fingerprint], objective: nn.Module
) -> Progress:
    """Where a run continues; rank 0 warns of changes. Ended where nothing is left to do."""
    state, progress = checkpoint.state, checkpoint.progress
    changes = list(_changes(checkpoint, config))
    if other := differences(state["data"][TRAINING], data[TRAINING]):
        others = f"the training pairs are not those of this checkpoint's run ({'; '.join(other)})"
        wrong(f"{checkpoint.path}: {others}; start from its weights with --init {checkpoint.path}")
    # A validation that later ones can be compared with: by the same pairs in the same batches.
    has_best = progress.stale and runs.find_best(config.save.out, config.save.best, measured(config, data)) is not None
    whole = is_whole(config.run, progress)
    if whole or (has_best and 0 < config.run.patience <= progress.stale):
        load_objective(checkpoint, objective)
        raise Ended(
            RunResult(
                run=checkpoint.path.parent.parent,
                steps=progress.step,
                epochs=progress.epoch,
                samples_seen=progress.samples_seen,
                seconds=progress.seconds,
                loss=None,
                checkpoint=checkpoint.path,
                already_finished=True,
                out_of_patience=not whole,
            )
        )
    processes, size = len(state["rng"]), state["batch_size"]
    if processes != world_size():
        goes_on = "the data go on where they were, sums may round differently"
        changes.append(f"{world_size()} processes instead of {processes}: {goes_on}")
    if size != config.run.batch_size:
        goes_on = "the data go on where they were, the learning rate where a run of that batch size would be"
        changes.append(f"batch size {config.run.batch_size} instead of {size}: {goes_on}")
    if progress.stale and not has_best:
        changes.append("held-out pairs that none of its validations was made with: --patience begins anew")
        progress = replace(progress, stale=0)
    if rank() != 0:  # the counts of bad samples are summed over ranks, so one rank keeps them
        return replace(progress, reasons={})
    for line in changes:
        logger.warning("resumed with %s", line)
    return progress


def _changes(checkpoint: Checkpoint, config: TrainConfig) -> Iterator[str]:
    """What differs from the checkpoint's run and changes the course of the training."""
    file = checkpoint.path.parent.parent / runs.RUN_CONFIG_FILE
    if not file.is_file():
        return
    before = TrainConfig.from_json(file).to_dict()
    for part, leaves in config.to_dict().items():
        for leaf, now in leaves.items():
            then = before[part][leaf]
            # A temperature is kept as its logarithm: read back, it may differ in the last digit.
            floats = isinstance(then, float) and isinstance(now, float)
            same = math.isclose(then, now, rel_tol=1e-6) if floats else then == now
            if part in _FREE_PARTS or leaf in _FREE.split() or same:
                continue
            if part in ("loss", "align", "given") or leaf in ("model", "image_size"):
                advice = f"resume with the same, or start from the weights with --init {checkpoint.path}"
                wrong(f"{checkpoint.path}: was trained with {part}.{leaf} = {then!r}, not {now!r}; {advice}")
            yield f"another {part}.{leaf}: {now!r} instead of {then!r}"


LOCK = ".lock"
LEASE_SECONDS, HEARTBEAT_SECONDS = 60.0, 2.0
_RUN_FILES = (runs.RUN_CONFIG_FILE, runs.METRICS_FILE, runs.EPOCHS_FILE, runs.SKIPPED_FILE, runs.CHECKPOINTS_FOLDER)
_PRODUCTS = (
    *("tensorboard", "results.json", "nonfinite-step-*.json"),
    *(runs.AVERAGED_FOLDER, runs.MEMBERS_FOLDER, runs.OBJECTIVES_FILE, runs.SUSPECTS_FILE),
)


@contextlib.contextmanager
def hold(run: Path) -> Iterator[Callable[[], None]]:
    """Locks a run folder, on rank 0 for all, and makes it if it is missing; yields a check that the lock still stands.

    The lock works on a network file system, too. A dead process of this host is passed over at once, one of another
    host after a minute without a heartbeat.
    """
    library = require("filelock", "train")
    lock = library.SoftFileLease(run / LOCK, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS)

    def beat() -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return (run / LOCK).stat().st_mtime_ns
        return None

    def name(owner: Any) -> str:
        return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"

    def acquire() -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            before = beat()
            lock.acquire(timeout=LEASE_SECONDS + 5, cancel_check=lambda: beat() not in (before, None))
        except OSError as error:
            why = f"the run folder cannot be written ({error.strerror})"
            if isinstance(error, library.Timeout):
                why = f"{name(lock.owner)} is writing this run; wait for it, stop it, or give another --out"
            raise InputError(f"{run}: {why}") from None

    def check() -> None:
        owner = lock.owner
        if owner is None or owner.token != lock.token:
            message = f"{name(owner)} took the run over while this process stood still; nothing more is written"
            raise TrainingFailed(f"{run}: {message}")

    on_rank_zero(acquire)
    try:
        yield lambda: on_rank_zero(check)
    finally:
        if rank() == 0:
            lock.release()
            with contextlib.suppress(OSError):  # not empty: then it stays
                run.rmdir()


def refuse_another_run(config: TrainConfig, checkpoint: Path | None) -> None:
    """Refuses a run folder with a run that is neither resumed nor replaced."""
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
    for pattern in (*_RUN_FILES, *_PRODUCTS) if save.overwrite else ():
        for path in out.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (out / runs.CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
