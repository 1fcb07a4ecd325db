"""What a caller can hook into a run, and lines of progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.training.config import TrainConfig

Line = Mapping[str, Any]
"""A line of ``metrics.jsonl`` or ``epochs.jsonl``."""


@dataclass(frozen=True)
class RunInfo:
    """A run as its callbacks see it."""

    run: Path  # its folder
    config: TrainConfig  # with every default filled in
    # a DualEncoder, or the given towers; a callback may switch it to eval mode, the
    # loop switches back
    encoder: nn.Module
    objective: nn.Module  # a ContrastiveObjective, or the given loss
    device: torch.device
    total_steps: int  # of the full run
    steps_per_epoch: int
    start_step: int = 0  # steps done before this process took over; 0 unless resumed
    rank: int = 0  # this process's


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    run: Path  # its folder
    steps: int  # optimiser steps done
    epochs: int  # ended, the last one perhaps early by the run's length
    samples_seen: int  # usable samples trained on
    # training time, checkpoints and validation included, over all resumptions
    seconds: float
    # of the last step that was not skipped; None if there was none in this process
    loss: float | None
    checkpoint: Path | None  # the newest; None if the run wrote none
    stopped: str | None = None  # None when the run reached its end, else ``"SIGTERM"``
    # samples of an epoch without use, by reason
    skipped: Mapping[str, int] = field(default_factory=dict)
    # the run that was to go on had reached its end before; nothing was written
    already_finished: bool = False
    # the end was not its length, but ``patience`` validations without a better one
    out_of_patience: bool = False


@dataclass(frozen=True)
class HeldOut:
    """What a metric of yours is made of, at a validation: of more than 10,000 pairs
    about as many.
    """

    towers: nn.Module  # in eval mode, or their average
    x: Tensor  # (N, D) unit rows of the held-out pairs of all ranks, on the CPU
    y: Tensor  # (N, D); row i belongs to row i of x
    ids: Tensor  # (N,) int64; rows of one id belong together


Metrics = Callable[[HeldOut], Mapping[str, float]]


class RunFinished(Exception):  # noqa: N818
    """A run is finished before its first step: nothing is left to train, and nothing
    was written. Raised on all ranks.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__(str(result.run))
        self.result = result


class Callback:
    """Override what you need.

    Called on every rank; random numbers drawn inside do not move the training's.
    """

    def on_start(self, info: RunInfo) -> None:
        """Before the first step."""

    def on_step(self, metrics: Line) -> None:
        """After every optimiser step, with the line of ``metrics.jsonl``.

        On a CUDA device lines come together, every 50 steps: the towers may be some
        steps further.
        """

    def on_epoch_end(self, metrics: Line) -> None:
        """After every epoch, with the line of ``epochs.jsonl``; also after one that the
        run's length ended early.
        """

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint is complete."""

    def on_end(self, result: RunResult | None) -> None:
        """At the end: ``result`` is None when an exception ended the run."""


class ProgressDisplay(Callback):
    """Prints a line with loss, speed and the time left every few seconds, and one at
    the end of an epoch; on rank 0 only.
    """

    def __init__(self, *, title: str = "train", every_seconds: float = 10.0) -> None:
        self.title = title
        self.every_seconds = every_seconds
        self._info: RunInfo | None = None
        self._began = self._last = 0.0

    def on_start(self, info: RunInfo) -> None:
        if info.rank == 0:
            self._info = info
        self._began = time.perf_counter()

    def on_step(self, metrics: Line) -> None:
        """Prints a line of progress, every so many seconds."""
        now = time.perf_counter()
        if self._info is None or now - self._last < self.every_seconds:
            return
        self._last = now
        step, total = metrics["step"], self._info.total_steps
        done = step - self._info.start_step
        left = round((now - self._began) / done * (total - step))
        self._say(
            f"step {step}/{total}, epoch {metrics['epoch']},"
            f" loss {_shown(metrics['loss'])},"
            f" {metrics['images_per_second']:.0f} pairs/s,"
            f" {metrics['data_wait']:.0%} waiting for data,"
            f" {timedelta(seconds=left)} left"
        )

    def on_epoch_end(self, metrics: Line) -> None:
        """Prints what the epoch and its validation gave."""
        message = f"epoch {metrics['epoch']} done, mean loss {_shown(metrics['loss'])}"
        if metrics["val_recall"] is not None:
            message += f", validation loss {_shown(metrics['val_loss'])}"
            message += f", mean recall {100 * metrics['val_recall']:.1f} %"
        for pairs, key in (("samples", "skipped"), ("held-out pairs", "val_skipped")):
            if metrics.get(key):
                counts = [f"{count} {why}" for why, count in metrics[key].items()]
                message += f"; skipped {pairs} (named in skipped.jsonl): "
                message += ", ".join(counts)
        self._say(message)

    def _say(self, message: str) -> None:
        if self._info is not None:
            print(f"{self.title}: {message}", file=sys.stderr, flush=True)


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
