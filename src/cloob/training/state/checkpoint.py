"""Checkpoints: written whole or not at all, and holding everything that the next step depends on.

``checkpoints/step-00000100/`` holds

- ``model/``: an open_clip ``local-dir:`` folder, what people load: the exact float32 weights, or with ``ema`` on their
  running average;
- ``trainer.pt``: all else that is resumed, with ``ema`` the weights themselves too (tensors and plain types only, read
  with ``weights_only=True``);
- ``validation.json``: how good ``model/`` is, when it was judged on held-out pairs.

The newest ``keep`` stay, and the best one by its validation.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cloob.data.fingerprint import Fingerprint, digest
from cloob.errors import InputError
from cloob.files import flush, flush_entries
from cloob.models.encoder import DualEncoder
from cloob.models.folder import save_model
from cloob.models.runs import (
    CHECKPOINTS_FOLDER,
    MODEL_FOLDER,
    TRAINER_FILE,
    VALIDATION_FILE,
    checkpoint_name,
    find_best,
    is_better,
    list_checkpoints,
)
from cloob.objective import ContrastiveObjective
from cloob.training import sharding
from cloob.training.config import TrainConfig
from cloob.training.course import Progress
from cloob.training.optim import WeightAverage
from cloob.training.ranks import gather_objects, on_rank_zero
from cloob.training.state.rng import rng_state
from cloob.training.step import Stepper

FORMAT = 1
TRAINING, HELD_OUT = "training pairs", "held-out pairs"
"""The two sets of pairs whose fingerprints a checkpoint keeps."""


class Saver:
    """Writes the checkpoints of one run, and knows the last (or the one it was resumed from) and the best."""

    def __init__(
        self,
        config: TrainConfig,
        encoder: DualEncoder,
        objective: ContrastiveObjective,
        stepper: Stepper,
        average: WeightAverage | None,
        device: torch.device,
        pairs: int,
        data: Mapping[str, Fingerprint],
        resumed: tuple[Path, Progress] | None,
    ) -> None:
        self.config = config
        self.encoder = encoder
        self.objective = objective
        self.stepper = stepper
        self.average = average
        self.device = device
        self.pairs = pairs
        self.data = data
        self.last: Path | None = resumed[0] if resumed else None
        self._saved = _place(resumed[1]) if resumed else None
        held_out = digest([json.dumps(data[HELD_OUT], sort_keys=True)]) if HELD_OUT in data else None
        self._measured = {"batch_size": config.run.batch_size, "held_out": held_out}
        best = on_rank_zero(lambda: find_best(config.save.out, config.save.best, self._measured))
        self._best: float | None = best[1] if best else None
        self._validation: tuple[int, dict[str, float | None]] | None = None

    def judged(self, step: int, metrics: dict[str, float | None]) -> bool:
        """Takes note of how good the weights after ``step`` are. Returns whether they are the best so far."""
        self._validation = step, metrics
        value = metrics[self.config.save.best]
        if value is None or (self._best is not None and not is_better(self.config.save.best, value, self._best)):
            return False
        self._best = value
        return True

    def save(self, progress: Progress, *, hopfield: bool) -> Path | None:
        """Writes a checkpoint of this step, unless there is one or the loss is not finite just now.

        If it stays so, the weights may be at fault: they must not push the good checkpoints out. One that was written
        at the end of an epoch before it was validated is written again. Every rank calls this, as each holds a part of
        the state; ``hopfield``: whether the objective retrieved at the last step.
        """
        if _place(progress) == self._saved or progress.nonfinite:
            return None
        weights, moments = sharding.whole_state(self.encoder, self.stepper.optimizer)
        state = {
            "format": FORMAT,
            "optimizer": moments,
            "stepper": self.stepper.state_dict(),
            "objective": self.objective.state_dict(),
            "progress": dict(vars(progress)),
            "rng": gather_objects(rng_state(self.device)),  # of every rank
            "batch_size": self.config.run.batch_size,
            "pairs": self.pairs,  # of an epoch: with another number the position in it means nothing
            "data": dict(self.data),
            "best": self.config.save.best,
        }
        if self.average is not None:
            state |= {"weights": self.encoder.state_dict(), "average": {"updates": self.average.updates}}
        validation: dict[str, Any] | None = None
        if self._validation is not None and self._validation[0] == progress.step:
            metric = self.config.save.best
            validation = {"step": progress.step, "metric": metric, **self._validation[1], **self._measured}

        def write(folder: Path) -> None:
            exported = self.encoder if self.average is None else self.average.encoder
            save_model(folder / MODEL_FOLDER, exported, self.objective.config() | {"hopfield": hopfield}, weights)
            if validation is not None:
                (folder / VALIDATION_FILE).write_text(json.dumps(validation, indent=2) + "\n", encoding="utf-8")
            with (folder / TRAINER_FILE).open("wb") as file:
                torch.save(state, file)

        save = self.config.save
        self.last = on_rank_zero(lambda: _write(save.out, progress.step, write, keep=save.keep))
        self._saved = _place(progress)
        return self.last


def _place(progress: Progress) -> tuple[int, int, int]:
    """What a checkpoint is of: a step, and whether the epoch that it ends was validated."""
    return progress.step, progress.epoch, progress.cut


def _write(run: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Writes a checkpoint under a temporary name, flushes it, then renames it; keeps the last ``keep`` and the best.

    InputError where the disk is full or not writable: earlier checkpoints are as they were.
    """
    folder = run / CHECKPOINTS_FOLDER
    final = folder / checkpoint_name(step)
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        flush(temporary)
        if final.exists():  # of a run that was stopped while it validated, or one that could not be read
            final.rename(_hidden(final))
        temporary.rename(final)
        flush_entries(folder)
    except Exception as error:
        reason = _disk_reason(error, folder)
        if reason is None:
            raise
        before = list_checkpoints(run)
        kept = f"the last whole checkpoint is {before[-1]}" if before else "there is no earlier checkpoint"
        raise InputError(f"{final}: checkpoint cannot be written ({reason}); {kept}") from error
    finally:
        remove_leftovers(run)
    if keep:
        best = find_best(run)
        for old in list_checkpoints(run)[:-keep]:
            if best is None or old != best[0]:
                # Renamed first: a folder with its final name is always whole.
                shutil.rmtree(old.rename(_hidden(old)), ignore_errors=True)
    return final


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".tmp-old-{checkpoint.name}-{os.getpid()}")


def remove_leftovers(run: Path) -> None:
    """Removes what an interrupted write left behind."""
    for path in (run / CHECKPOINTS_FOLDER).glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Renames the checkpoints of a run that come after this one: unreadable ones must not count as the newest."""
    for path in list_checkpoints(checkpoint.parent.parent):
        if path.name > checkpoint.name:
            aside = path.with_name(f"unreadable-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _disk_reason(error: BaseException, folder: Path) -> str | None:
    """Why the disk refused, or None if it was not the disk. torch's writer hides the errno."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno is not None:
            return os.strerror(chain.errno)
        chain = chain.__cause__ or chain.__context__
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if isinstance(error, RuntimeError) and shutil.disk_usage(existing).free < 2**20:
        return os.strerror(errno.ENOSPC)
    return None
