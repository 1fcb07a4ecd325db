"""What a run writes down, what it shows while it runs, and whom else it tells."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from cloob.errors import InputError, one_line, require
from cloob.files import write_whole
from cloob.models.runs import EPOCHS_FILE, METRICS_FILE, SKIPPED_FILE
from cloob.training.callbacks import Callback, RunInfo, RunResult
from cloob.training.ranks import on_rank_zero

logger = logging.getLogger(__name__)
MIN_WAIT = 0.3
"""The share of an epoch's time from which waiting for data or for the device is worth a word."""


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


class RunLog:
    """The logs of a run folder, written by rank 0 alone: a JSON object a line, each written through at once.

    Args:
        run: The run folder.
        keep_to_step: Lines of an earlier run with a greater ``step`` are dropped, as is a last line that was cut
            short; so a resumed run writes each step once. None starts empty files.
        cut: Whether that step ended an epoch early: the line of the whole epoch will take the place of that one's.
        writes: Whether this process writes; the others' calls do nothing.
    """

    def __init__(self, run: Path, keep_to_step: int | None, *, cut: bool = False, writes: bool) -> None:
        self._files: dict[str, TextIO] = {}
        for name in (METRICS_FILE, EPOCHS_FILE, SKIPPED_FILE) if writes else ():
            path, step = run / name, keep_to_step
            if cut and name == EPOCHS_FILE and step is not None:
                step -= 1
            try:
                temporary = path.with_name(f".tmp-{name}")
                temporary.write_text("".join(_lines_to(path, step)), encoding="utf-8")
                temporary.replace(path)
                self._files[path.stem] = path.open("a", encoding="utf-8")
            except OSError as error:
                raise InputError(f"{path}: cannot be written ({error.strerror})") from error

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Appends one object to ``metrics``, ``epochs`` or ``skipped``; InputError where the disk refuses it."""
        if not self._files:
            return
        file = self._files[name]
        try:
            file.write(json.dumps(values, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what is still in its buffer would be refused again, without a name
                file.close()
            raise InputError(f"{file.name}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


def _lines_to(path: Path, step: int | None) -> list[str]:
    """The whole lines of a log whose step is at most ``step``; none without one."""
    kept: list[str] = []
    if step is None or not path.is_file():
        return kept
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        kept.append(line + "\n")
    return kept


class ProgressDisplay(Callback):
    """Shows loss, images per second and the time left: a bar on a terminal, plain lines elsewhere; rank 0 only.

    Args:
        mode: ``"auto"``, ``"bar"``, ``"lines"`` or ``"none"``.
        title: What stands before the bar, e.g. the objective's name.
        every_seconds: Time between plain lines.
    """

    def __init__(self, mode: str = "auto", *, title: str = "train", every_seconds: float = 10.0) -> None:
        if mode not in ("auto", "bar", "lines", "none"):
            raise ValueError(f"unknown progress mode {mode!r}; auto, bar, lines or none")
        # A bar drawn into a log file is noise; so is one on a terminal that cannot move its cursor.
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.mode = ("bar" if terminal else "lines") if mode == "auto" else mode
        self.title = title
        self.every_seconds = every_seconds
        self._info: RunInfo | None = None
        self._bar: Any = None
        self._rate = 0.0
        self._began = self._last = 0.0
        self._done = 0
        self._waits: dict[str, list[float]] = {"data": [], "device": []}  # shares of an epoch's steps

    def on_start(self, info: RunInfo) -> None:
        """Draws the empty bar."""
        if info.rank != 0 or self.mode == "none":
            return
        self._info = info
        self._began = self._last = time.perf_counter()
        if self.mode == "bar":
            self._bar = _rich_bar()
            self._task = self._bar.add_task(
                self.title, total=info.total_steps, completed=info.start_step, loss="-", rate="-"
            )
            self._bar.start()

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """Moves the bar, or prints a line when it is time."""
        if self._info is None:
            return
        self._done += 1
        for name, shares in self._waits.items():
            shares.append(metrics.get(f"{name}_wait", 0.0))
        speed = metrics["images_per_second"]
        self._rate = speed if self._rate == 0 else 0.9 * self._rate + 0.1 * speed
        loss = "skipped" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics["step"], loss=loss, rate=f"{self._rate:.0f}")
        elif self._done == 1 or now - self._last >= self.every_seconds:
            self._last = now
            left = (now - self._began) / self._done * (self._info.total_steps - metrics["step"])
            self._print(
                f"{self.title}: step {metrics['step']}/{self._info.total_steps}, epoch {metrics['epoch']}, "
                f"loss {loss}, {self._rate:.0f} images/s, {_clock(left)} left"
            )

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        """Says how the epoch went and what could not be used."""
        if self._info is None:
            return
        validation = "" if metrics.get("val_loss") is None else f", validation loss {metrics['val_loss']:.4f}"
        if metrics.get("val_recall") is not None:
            validation += f", mean recall {100 * metrics['val_recall']:.1f} %"
        if lost := sum(metrics.get("val_skipped", {}).values()):
            validation += f" (without {lost} held-out pairs, named in skipped.jsonl)"
        waiting = self._waiting()
        mean = "-" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        skipped = ", ".join(f"{count} {reason}" for reason, count in metrics["skipped"].items())
        if self.mode == "lines" or validation or skipped or waiting:
            self._print(
                f"{self.title}: epoch {metrics['epoch']} done, mean loss {mean}{validation}{waiting}"
                + (f"; skipped samples (named in skipped.jsonl): {skipped}" if skipped else "")
            )

    def _waiting(self) -> str:
        """What the steps of the epoch waited for, where that is worth a word; begins to count anew."""
        data, device = (sum(shares) / len(shares) if shares else 0.0 for shares in self._waits.values())
        self._waits = {name: [] for name in self._waits}
        if max(data, device) < MIN_WAIT:
            return ""
        if data < device:
            return f", {device:.0%} of the time waiting for the device (data keep up)"
        return f", {data:.0%} of the time waiting for data (more --workers, a faster disk or smaller pictures help)"

    def on_end(self, result: RunResult | None) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    from rich.console import Console  # for terminals alone
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # likewise

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[rate]} images/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Tracker(Callback):
    """Hands the numbers of rank 0 on: steps as ``train/…``, epochs as ``epoch/…``; dropped with a warning if it fails.

    ``metrics.jsonl`` stays the source of truth. A tracker begins in ``on_start`` and sets ``sink`` to what takes the
    numbers and their step.
    """

    name = "the tracker"

    def __init__(self) -> None:
        self.sink: Any = None

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """Logs every number of a step."""
        self._log("train", metrics)

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        """Logs every number of an epoch."""
        self._log("epoch", metrics)

    def _log(self, group: str, metrics: Mapping[str, Any]) -> None:
        if self.sink is None:
            return
        numbers = {f"{group}/{name}": v for name, v in metrics.items() if name != "step" and isinstance(v, int | float)}
        try:
            self.sink(numbers, metrics["step"])
        except Exception as error:  # whatever a client raises when its server or disk is gone
            logger.warning("%s failed (%s) and is left out from here on; metrics.jsonl goes on", self.name, error)
            self.sink = None

    def on_end(self, result: RunResult | None) -> None:
        """Ends what began; an error here would hide the one that ended the training."""
        sink, self.sink = self.sink, None
        try:
            if sink is not None:
                self.finish(failed=result is None)
        except Exception as error:
            logger.warning("%s could not be finished (%s)", self.name, error)

    def finish(self, *, failed: bool) -> None:
        """Ends a run that began."""


class TensorBoard(Tracker):
    """TensorBoard events; does nothing where TensorBoard is not installed."""

    name = "TensorBoard"

    def on_start(self, info: RunInfo) -> None:
        """Opens the event file; events after a resumed step are purged."""
        if info.rank != 0:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # an extra
        except ImportError:
            return
        writer = self._writer = SummaryWriter(str(info.run / "tensorboard"), purge_step=info.start_step + 1)

        def write(numbers: Mapping[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)  # its own thread writes, and raises at one of the next

        self.sink = write

    def finish(self, *, failed: bool) -> None:
        """Closes the event file."""
        self._writer.close()


class WandB(Tracker):
    """Weights & Biases.

    A resumed run goes on in the same run there, by an id in the run folder. wandb takes a step only once: steps between
    the checkpoint and the kill keep what was logged first. If it cannot begin, every rank raises InputError before the
    first step.
    """

    name = "wandb"

    def __init__(self, project: str) -> None:
        super().__init__()
        self.project = project
        self._module: Any = require("wandb", "wandb")  # on every rank: an error on one alone would leave the others

    def on_start(self, info: RunInfo) -> None:
        """Begins a run there, or goes on in the one before."""
        on_rank_zero(lambda: self._begin(info))

    def _begin(self, info: RunInfo) -> None:
        try:
            run = self._run = self._module.init(
                project=self.project,
                config=info.config.to_dict(),
                resume="allow",
                id=_run_id(info.run / "wandb.json", resumed=info.start_step > 0),
                name=info.run.name,
                dir=str(info.run),
            )
        except Exception as error:  # whatever a client raises without a login or a server
            raise InputError(f"wandb: {one_line(error)}; log in there, or leave --wandb out") from error
        self.sink = lambda numbers, step: run.log(numbers, step=step)

    def finish(self, *, failed: bool) -> None:
        """Ends the run there; one that broke off is marked as failed."""
        self._run.finish(exit_code=int(failed))


def _run_id(file: Path, *, resumed: bool) -> str:
    """The id of this run at wandb: kept in the run folder, new when the run is."""
    if resumed and file.is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    token = secrets.token_hex(4)
    write_whole(file, json.dumps({"id": token}) + "\n")
    return token
