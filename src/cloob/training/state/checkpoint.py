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
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.data.fingerprint import Fingerprint
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
    list_checkpoints,
)
from cloob.objective import ContrastiveObjective
from cloob.training.towers import fsdp as sharding
from cloob.training.towers.average import WeightAverage

logger = logging.getLogger(__name__)
FORMAT = 1


@dataclass
class Progress:
    """Where a run stands. Positions count samples over all ranks, so they mean the same for any world size.

    Attributes:
        step: Optimiser steps done, skipped ones included.
        epoch: Epochs completed.
        position: Samples of the current epoch's order already passed, whether usable or not.
        lanes: Sequences of shards that the current epoch's order is made of; 0: not begun, one for each process.
        cut: Step at which the run's length last ended the current epoch early, with a line of its own; 0: it did not.
        samples_seen: Usable samples trained on.
        nonfinite: Steps in a row skipped for a non-finite loss or gradient.
        seconds: Training time so far.
        epoch_good: Usable samples of the current epoch.
        epoch_bad: Samples of the current epoch that could not be used, over all ranks.
        reasons: The same by reason; each rank counts its own, the checkpoint holds the sum.
        loss_sum: Sum of the losses of the current epoch's steps that were not skipped.
        loss_steps: Their number.
        stale: Epochs in a row in which the held-out pairs found nothing better.
        start: Fingerprint of the ``init`` that the run began with; empty without one, and where it was not kept.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    lanes: int = 0
    cut: int = 0
    samples_seen: int = 0
    nonfinite: int = 0
    seconds: float = 0.0
    epoch_good: int = 0
    epoch_bad: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    loss_sum: float = 0.0
    loss_steps: int = 0
    stale: int = 0
    start: str = ""

    def begin_epoch(self) -> None:
        """Forgets what there is of the current epoch, so that it begins, or begins anew."""
        self.position = self.lanes = self.cut = 0
        self.epoch_good = self.epoch_bad = self.loss_steps = 0
        self.loss_sum, self.reasons = 0.0, {}


def whole_state(
    encoder: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """The encoder's weights, None where it holds them whole, and the optimiser's state; called on all ranks at once."""
    if not sharding.is_sharded(encoder):
        return None, optimizer.state_dict()
    return sharding.gather_state(encoder.state_dict()), sharding.gather_state(optimizer.state_dict())


@dataclass(frozen=True)
class TrainerState:
    """What a run goes on from beside weights and objective; what may have changed since is compared on resumption."""

    optimizer: dict[str, Any]
    stepper: dict[str, Any]
    progress: Progress
    rng: list[dict[str, Any]]  # of every rank
    batch_size: int  # global
    pairs: int  # of an epoch: with another number the position in it means nothing
    data: Mapping[str, Fingerprint]  # of training and held-out pairs
    best: str  # what makes a checkpoint the best


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: ``encoder`` holds the weights of ``model/``, ``state`` what ``trainer.pt`` holds."""

    path: Path
    encoder: DualEncoder
    state: dict[str, Any]

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return Progress(**self.state["progress"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to go on from: those of ``model/``, unless these are an average."""
        weights: dict[str, Tensor] = self.state["weights"] if "weights" in self.state else self.encoder.state_dict()
        return weights


def save_checkpoint(
    run: Path,
    encoder: DualEncoder,
    objective: ContrastiveObjective,
    trainer: TrainerState,
    *,
    keep: int,
    hopfield: bool | None = None,
    weights: dict[str, Tensor] | None = None,
    average: WeightAverage | None = None,
    validation: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint under a temporary name, flushes it, then renames it; keeps the last ``keep`` and the best.

    ``weights`` is the encoder's whole ``state_dict`` where it is in shards; ``average`` goes into the model folder in
    place of the weights. InputError where the disk is full or not writable: earlier checkpoints are as they were.
    """
    folder = run / CHECKPOINTS_FOLDER
    final = folder / checkpoint_name(trainer.progress.step)
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    state = {
        **vars(trainer),
        "format": FORMAT,
        "objective": objective.state_dict(),
        "progress": dict(vars(trainer.progress)),
        "data": dict(trainer.data),
    }
    if average is not None:
        state |= {"weights": encoder.state_dict(), "average": {"updates": average.updates}}
    try:
        temporary.mkdir(parents=True)
        exported = encoder if average is None else average.encoder
        settings = objective.config() | ({} if hopfield is None else {"hopfield": hopfield})
        save_model(temporary / MODEL_FOLDER, exported, settings, weights)
        if validation is not None:
            text = json.dumps({"step": trainer.progress.step, **validation}, indent=2) + "\n"
            (temporary / VALIDATION_FILE).write_text(text, encoding="utf-8")
        with (temporary / TRAINER_FILE).open("wb") as file:
            torch.save(state, file)
        _put_in_place(temporary, final)
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
        _prune(run, keep)
    return final


def _put_in_place(temporary: Path, final: Path) -> None:
    """Flushes a whole checkpoint to the disk, then gives it its name."""
    flush(temporary)
    if final.exists():  # of a run that was stopped while it validated, or one that could not be read
        final.rename(_hidden(final))
    temporary.rename(final)
    flush_entries(final.parent)


def _prune(run: Path, keep: int) -> None:
    """Removes all checkpoints but the newest and the best."""
    best = find_best(run)
    for old in list_checkpoints(run)[:-keep]:
        if best is None or old != best[0]:
            _remove(old)


def set_aside(checkpoint: Path) -> None:
    """Renames the checkpoints of a run that come after this one: unreadable ones must not count as the newest."""
    for path in list_checkpoints(checkpoint.parent.parent):
        if path.name > checkpoint.name:
            aside = path.with_name(f"unreadable-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def remove_leftovers(run: Path) -> None:
    """Removes what an interrupted write left behind."""
    for path in (run / CHECKPOINTS_FOLDER).glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    # Renamed first: a folder with its final name is always whole.
    shutil.rmtree(checkpoint.rename(_hidden(checkpoint)), ignore_errors=True)


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".tmp-old-{checkpoint.name}-{os.getpid()}")


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
