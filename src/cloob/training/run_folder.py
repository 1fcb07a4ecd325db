"""The run folder: one run and one writing process, where a run is resumed, its JSON
lines, and its bad samples.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from cloob.data.bad import too_many
from cloob.data.batch import Batch, Skip
from cloob.data.loader import Loader
from cloob.data.source import Fingerprint, differences
from cloob.distributed import gather_objects, rank, world_size
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models import runs
from cloob.models.load import find_model_folder
from cloob.settings import SCALES
from cloob.training.callbacks import RunFinished, RunResult
from cloob.training.checkpoint import TRAINING, Checkpoint, load_objective
from cloob.training.config import TrainConfig
from cloob.training.progress import Progress, is_whole

logger = logging.getLogger(__name__)

# Changing these between a run and its resumption changes no number of the training;
# batch_size has another line.
_FREE = """workers val_data device patience batch_size
given_held_out given_metrics out save_every keep best resume overwrite tensorboard"""
# What the weights belong to.
_FIXED = (
    *("objective", "retrieval_from", "mask_duplicates", "model", "image_size"),
    *SCALES,
)


def progress_of(
    checkpoint: Checkpoint,
    config: TrainConfig,
    data: Mapping[str, Fingerprint],
    objective: nn.Module,
) -> Progress:
    """Where a run continues; rank 0 warns of changes.

    Raises RunFinished where nothing is left to do.
    """
    progress = checkpoint.progress
    changes = _changes(checkpoint, config)
    _refuse_other_pairs(checkpoint, data)
    is_ended = is_whole(config, progress)
    if is_ended or 0 < config.patience <= progress.stale:
        load_objective(checkpoint, objective)
        raise RunFinished(_finished(checkpoint, out_of_patience=not is_ended))
    changes += _changed_layout(checkpoint, config)
    if rank() != 0:
        # the counts of bad samples are summed over ranks, so one rank keeps them
        return replace(progress, reasons={})
    for line in changes:
        logger.warning("resumed with %s", line)
    return progress


def _refuse_other_pairs(
    checkpoint: Checkpoint, data: Mapping[str, Fingerprint]
) -> None:
    other = differences(checkpoint.state["data"][TRAINING], data[TRAINING])
    if other:
        raise InputError(
            f"{checkpoint.path}: the training pairs are not those of this checkpoint's"
            f" run ({'; '.join(other)}); start from its weights with --init"
            f" {checkpoint.path}"
        )


def _finished(checkpoint: Checkpoint, *, out_of_patience: bool) -> RunResult:
    """The result of a run that had ended before."""
    progress = checkpoint.progress
    return RunResult(
        run=checkpoint.path.parent.parent,
        steps=progress.step,
        epochs=progress.epoch,
        samples_seen=progress.samples_seen,
        seconds=progress.seconds,
        loss=None,
        checkpoint=checkpoint.path,
        already_finished=True,
        out_of_patience=out_of_patience,
    )


def _changed_layout(checkpoint: Checkpoint, config: TrainConfig) -> list[str]:
    """What another number of processes, or another batch size, changes."""
    changes, state = [], checkpoint.state
    if len(state["rng"]) != world_size():
        changes.append(
            f"{world_size()} processes instead of {len(state['rng'])}: the data go on"
            " where they were, sums may round differently"
        )
    if state["batch_size"] != config.batch_size:
        changes.append(
            f"batch size {config.batch_size} instead of {state['batch_size']}: the data"
            " go on where they were, the learning rate where a run of that batch size"
            " would be"
        )
    return changes


def _changes(checkpoint: Checkpoint, config: TrainConfig) -> list[str]:
    """What differs from the checkpoint's run and changes the course of the training."""
    file, changes = checkpoint.path.parent.parent / runs.RUN_CONFIG_FILE, list[str]()
    if not file.is_file():
        return changes
    before = TrainConfig().merge_file(file).to_dict()
    for name, now in config.to_dict().items():
        then = before[name]
        # A temperature is kept as its logarithm: read back, it may differ in the last
        # digit.
        floats = isinstance(then, float) and isinstance(now, float)
        same = math.isclose(then, now, rel_tol=1e-6) if floats else then == now
        if same or name in _FREE.split():
            continue
        if name in _FIXED or name.startswith("given_"):
            raise InputError(
                f"{checkpoint.path}: was trained with {name} = {then!r}, not {now!r};"
                " resume with the same, or start from the weights with --init"
                f" {checkpoint.path}"
            )
        changes.append(f"another {name}: {now!r} instead of {then!r}")
    return changes


def refuse_another_run(config: TrainConfig) -> None:
    """Refuses a folder that holds a run which this one neither goes on with nor may
    replace.
    """
    if not runs.find_run(config.out):
        return
    if config.overwrite:
        _check_removable(config)
    elif config.resume == "none":
        raise InputError(
            f"{config.out}: already holds a run; go on with --resume auto, or give"
            " --overwrite or another --out"
        )


def _check_removable(config: TrainConfig) -> None:
    """Refuses to remove what this run needs."""
    out, init = config.out, config.init
    # a rank has died: it is the run itself
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise InputError(
            f"{out}: holds the run that torchrun has started again, which --overwrite"
            " would remove; give --resume auto in its place"
        )
    folder = find_model_folder(init) if init is not None else None
    if folder is not None and folder.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"init {init!r} lies in {out}, which --overwrite would remove; give another"
            " --out"
        )


def prepare_run_folder(config: TrainConfig, checkpoint: Path | None) -> None:
    """Makes the run folder; an earlier run is removed, and unreadable checkpoints after
    the resumed one, which must not count as the newest, are set aside.
    """
    out = config.out
    if config.overwrite:
        runs.remove_run(out)
    (out / runs.CHECKPOINTS_FOLDER).mkdir(parents=True, exist_ok=True)
    for path in runs.list_checkpoints(out):
        if checkpoint is not None and path.name > checkpoint.name:
            aside = path.with_name(f"unreadable-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


MIN_BAD = 20  # fewer bad samples say nothing yet about the fraction
MAX_BAD_IN_A_ROW = 1000  # as of a mount that has died
MAX_NAMED = 1000  # bad samples of an epoch in the file
Read = tuple[int, Skip]  # a sample that could not be used, with the rank that read it


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


class RunLog:
    """The JSON lines of a run folder, written through at once; those after
    ``keep_to_step`` are dropped (None: all).
    """

    def __init__(self, run: Path, keep_to_step: int | None, *, writes: bool) -> None:
        self._files: dict[str, TextIO] = {}
        for path in (
            run / name
            for name in (runs.METRICS_FILE, runs.EPOCHS_FILE, runs.SKIPPED_FILE)
            if writes
        ):
            lines_to_step: list[str] = []
            if keep_to_step is not None and path.is_file():
                # up to a line that was cut short
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    for line in path.read_text(
                        encoding="utf-8", errors="replace"
                    ).splitlines():
                        if json.loads(line)["step"] > keep_to_step:
                            break
                        lines_to_step.append(line + "\n")
            write_whole(path, "".join(lines_to_step))
            self._files[path.stem] = path.open("a", encoding="utf-8")

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Appends one object to ``metrics``, ``epochs`` or ``skipped``; InputError
        where the disk refuses it.
        """
        if not self._files:
            return
        file = self._files[name]
        try:
            file.write(json.dumps(values, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            # what is still in its buffer would be refused again, without a name
            with contextlib.suppress(OSError):
                file.close()
            raise InputError(
                f"{file.name}: cannot be written ({error.strerror})"
            ) from error

    def write_skipped(self, place: Mapping[str, Any], skipped: Sequence[Read]) -> None:
        for reader, skip in skipped[:MAX_NAMED]:
            reason = {
                "rank": reader,
                "key": skip.key,
                "reason": skip.reason,
                "detail": skip.detail,
            }
            self.write("skipped", {**place, **reason})

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class BadSamples:
    """Counts the samples of an epoch that could not be used, by reason; ends a run of
    more than the share ``limit``.
    """

    def __init__(
        self, progress: Progress, loader: Loader, limit: float, log: RunLog
    ) -> None:
        self.progress, self.loader, self.limit, self.log = progress, loader, limit, log
        self._in_a_row = 0
        self._examples: dict[str, str] = {}

    def count(self, batch: Batch, good: int, bad: int) -> None:
        """Adds a batch with so many usable and bad samples over all ranks."""
        progress = self.progress
        for skip in batch.skipped:
            progress.reasons[skip.reason] = progress.reasons.get(skip.reason, 0) + 1
            self._examples.setdefault(
                skip.reason, ": ".join(filter(None, (skip.key, skip.detail)))
            )
        if bad and progress.epoch_bad < MAX_NAMED:
            place = {"step": progress.step + 1, "epoch": progress.epoch + 1}
            self.log.write_skipped(place, with_readers(batch.skipped))
        progress.epoch_good += good
        progress.epoch_bad += bad
        self._in_a_row = 0 if good else self._in_a_row + bad
        if progress.epoch_bad >= MIN_BAD:
            self.check()

    def check(self, *, ended: bool = False) -> None:
        """Compares the bad samples with the limit, a share of the epoch, or of the
        epoch so far if it has ``ended``.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        so_far = ended or self._in_a_row >= MAX_BAD_IN_A_ROW
        total = good + bad if so_far else max(good + bad, self.loader.pairs_per_epoch)
        nothing = ended and bad > 0 and good == 0
        if bad > self.limit * total or nothing:
            examples = ChainMap(*gather_objects(self._examples))
            message = f"{self.loader.name}: {bad} of {good + bad} samples"
            raise too_many(message, nothing, self.limit, self.reasons(), examples)

    def reasons(self) -> dict[str, int]:
        return dict(
            sum(
                map(Counter, gather_objects(self.progress.reasons)), Counter[str]()
            ).most_common()
        )


def with_readers(skipped: Sequence[Skip]) -> list[Read]:
    return [
        (reader, skip)
        for reader, part in enumerate(gather_objects(skipped))
        for skip in part
    ]
