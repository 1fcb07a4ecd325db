"""What a caller can hook into a run, and the callbacks that come along: a progress
display and trackers.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.distributed import on_rank_zero
from cloob.errors import InputError, one_line, require
from cloob.files import write_whole
from cloob.training.config import TrainConfig

logger = logging.getLogger(__name__)
# the share of an epoch's time from which waiting for data or for the device is worth a
# word
MIN_WAIT = 0.3


@dataclass(frozen=True)
class RunInfo:
    """A run as its callbacks see it."""

    run: Path  # its folder
    config: TrainConfig  # with every default filled in
    # a DualEncoder, or the given towers; a callback may switch it to eval mode, the
    # loop switches back
    encoder: Any
    objective: Any  # a ContrastiveObjective, or the given loss
    device: torch.device
    total_steps: int  # of the full run
    steps_per_epoch: int
    start_step: int = 0  # steps done before this process took over; 0 unless resumed
    rank: int = 0  # this process's
    resumed_from: Path | None = None  # the checkpoint
    pairs_per_epoch: int = 0  # usable or not


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    run: Path  # its folder
    steps: int  # optimiser steps done
    epochs: int  # ended, the last one perhaps early by the run's length
    samples_seen: int  # usable samples trained on
    # training time, checkpoints and validation included, over all resumptions
    seconds: float
    loss: (
        float | None
    )  # of the last step that was not skipped; None if there was none in this process
    checkpoint: Path | None  # the newest; None if the run wrote none
    stopped: str | None = None  # None when the run reached its end, else ``"SIGTERM"``
    skipped: Mapping[str, int] = field(
        default_factory=dict
    )  # samples of an epoch without use, by reason
    # the run that was to go on had reached its end before; nothing was written
    already_finished: bool = False
    # the end was not its length, but ``patience`` validations without a better one
    out_of_patience: bool = False


@dataclass(frozen=True)
class HeldOut:
    """What a metric of yours is made of, at a validation: of more than 10,000 pairs
    about as many.
    """

    towers: Any  # in eval mode, or their average
    x: Tensor  # (N, D) unit rows of the held-out pairs of all ranks, on the CPU
    y: Tensor  # (N, D); row i belongs to row i of x
    ids: Tensor  # (N,) int64; rows of one id belong together


Metrics = Callable[[HeldOut], Mapping[str, float]]


class Ended(Exception):  # noqa: N818
    """A run ended before its first step, and nothing was written; raised on all
    ranks.
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

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """After every optimiser step, with the line of ``metrics.jsonl``.

        On a CUDA device lines come together, every ``log_every`` steps: the towers may
        be some steps further.
        """

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        """After every epoch, with the line of ``epochs.jsonl``; also after one that the
        run's length ended early.
        """

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint is complete."""

    def on_end(self, result: RunResult | None) -> None:
        """At the end: ``result`` is None when an exception ended the run."""


class ProgressDisplay(Callback):
    """Shows loss, images per second and the time left: a bar on a terminal, plain lines
    elsewhere; rank 0 only.
    """

    def __init__(self, *, title: str = "train", every_seconds: float = 10.0) -> None:
        self.title = title
        self.every_seconds = every_seconds  # between plain lines
        self._info: RunInfo | None = None
        self._bar: Any = None
        self._say: Callable[[str], object] = partial(print, file=sys.stderr, flush=True)
        self._rate = 0.0
        self._began = self._last = 0.0
        self._done = 0
        self._waits: dict[str, list[float]] = {
            "data": [],
            "device": [],
        }  # shares of an epoch's steps

    def on_start(self, info: RunInfo) -> None:
        if info.rank != 0:
            return
        self._info = info
        self._began = self._last = time.perf_counter()
        # A bar drawn into a log file is noise; so is one on a terminal that cannot move
        # its cursor.
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console  # for terminals alone
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            texts = (
                "{task.description}",
                "loss {task.fields[loss]}",
                "{task.fields[rate]}",
                "left",
            )
            title, loss, rate, left = map(TextColumn, texts)
            columns = (
                title,
                BarColumn(),
                MofNCompleteColumn(),
                loss,
                rate,
                TimeRemainingColumn(),
                left,
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._say = partial(
                self._bar.console.print, highlight=False, markup=False, soft_wrap=True
            )
            steps = {"total": info.total_steps, "completed": info.start_step}
            self._task = self._bar.add_task(self.title, **steps, loss="-", rate="-")
            self._bar.start()

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        if self._info is None:
            return
        self._done += 1
        for name, shares in self._waits.items():
            shares.append(metrics.get(f"{name}_wait", 0.0))
        step, total, speed = (
            metrics["step"],
            self._info.total_steps,
            metrics["images_per_second"],
        )
        self._rate = speed if self._rate == 0 else 0.9 * self._rate + 0.1 * speed
        loss = "skipped" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        rate, now = f"{self._rate:.0f} pairs/s", time.perf_counter()
        of_rank = metrics["images_per_second_per_rank"]
        if of_rank < speed:
            rate += f" ({self._rate * of_rank / speed:.0f} a rank)"
        waits, memory = (
            sum(self._waits["data"]) / len(self._waits["data"]),
            metrics["peak_memory"] / 1024**3,
        )
        rate += f", {waits:.0%} waiting for data, {memory:.1f} GiB at most"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, rate=rate)
        elif self._done == 1 or now - self._last >= self.every_seconds:
            self._last = now
            left = timedelta(
                seconds=round((now - self._began) / self._done * (total - step))
            )
            epoch = metrics["epoch"]
            self._say(
                f"{self.title}: step {step}/{total}, epoch {epoch}, loss {loss},"
                f" {rate}, {left} left"
            )

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        if self._info is None:
            return
        loss = "-" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        message = f"{self.title}: epoch {metrics['epoch']} done, mean loss {loss}"
        if metrics.get("val_loss") is not None:
            message += f", validation loss {metrics['val_loss']:.4f}"
        if metrics.get("val_recall") is not None:
            message += f", mean recall {100 * metrics['val_recall']:.1f} %"
        lost = sum(metrics.get("val_skipped", {}).values())
        if lost:
            message += f" (without {lost} held-out pairs, named in skipped.jsonl)"
        message += self._waiting()
        if metrics["skipped"]:
            counts = [f"{count} {why}" for why, count in metrics["skipped"].items()]
            message += (
                f"; skipped samples (named in skipped.jsonl): {', '.join(counts)}"
            )
        self._say(message)

    def _waiting(self) -> str:
        """What the epoch's steps waited for, if that is worth a word; then the next
        epoch begins.
        """
        data, device = (
            sum(shares) / max(1, len(shares)) for shares in self._waits.values()
        )
        self._waits = {name: [] for name in self._waits}
        if device > max(data, MIN_WAIT):
            return f", {device:.0%} of the time waiting for the device (data keep up)"
        if data >= MIN_WAIT:
            return (
                f", {data:.0%} of the time waiting for data (more --workers, a faster"
                " disk or smaller pictures help)"
            )
        return ""

    def on_end(self, result: RunResult | None) -> None:
        if self._bar is not None:
            self._bar.stop()


class Tracker(Callback):
    """Passes numbers of rank 0 to ``sink``, and at the end to ``finish`` whether the
    run failed; warns if it fails.
    """

    sink: Any = None
    finish: Any = None

    def on_step(self, metrics: Mapping[str, Any], *, group: str = "train") -> None:
        numbers = {
            f"{group}/{name}": v
            for name, v in metrics.items()
            if name != "step" and isinstance(v, int | float)
        }
        self._try("sink", numbers, metrics["step"])

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        self.on_step(metrics, group="epoch")

    def on_end(self, result: RunResult | None) -> None:
        self._try(
            "finish", result is None
        )  # an error here would hide the one that ended the training

    def _try(self, action: str, *arguments: object) -> None:
        if self.sink is None:
            return
        try:
            getattr(self, action)(*arguments)
        except (
            Exception
        ) as error:  # whatever a client raises when its server or disk is gone
            message = (
                "%s failed (%s) and is left out from here on; metrics.jsonl goes on"
            )
            logger.warning(message, type(self).__name__, error)
            self.sink = None


class TensorBoard(Tracker):
    """TensorBoard events. Those after a resumed step are purged."""

    def on_start(self, info: RunInfo) -> None:
        if info.rank != 0:
            return
        writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter(
            str(info.run / "tensorboard"), purge_step=info.start_step + 1
        )

        def write(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                # a thread writes, and raises at one of the next calls
                writer.add_scalar(name, value, step)

        self.sink, self.finish = write, lambda failed: writer.close()


class WandB(Tracker):
    """Weights & Biases.

    A resumed run continues there by an id in the run folder; logged steps stay as they
    were.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self._module: Any = require(
            "wandb", "wandb"
        )  # on every rank: an error on one alone would leave the others

    def on_start(self, info: RunInfo) -> None:
        def begin() -> None:
            file = info.run / "wandb.json"
            if info.start_step == 0 or not file.is_file():
                write_whole(file, json.dumps({"id": secrets.token_hex(4)}) + "\n")
            known = {
                **json.loads(file.read_text(encoding="utf-8")),
                "resume": "allow",
                "name": info.run.name,
            }
            try:
                run = self._module.init(
                    project=self.project,
                    config=info.config.to_dict(),
                    dir=str(info.run),
                    **known,
                )
            except (
                Exception
            ) as error:  # whatever a client raises without a login or a server
                raise InputError(
                    f"wandb: {one_line(error)}; log in there, or leave --wandb out"
                ) from error
            self.sink = lambda numbers, step: run.log(numbers, step=step)
            self.finish = lambda failed: run.finish(exit_code=int(failed))

        on_rank_zero(begin)
