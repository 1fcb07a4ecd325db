"""What a run writes down, and what it shows while it runs."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.models.runs import EPOCHS_FILE, METRICS_FILE, SKIPPED_FILE
from cloob.training.callbacks import Callback, RunInfo, RunResult

logger = logging.getLogger(__name__)
_MUCH = 0.3  # of the time of a step


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


class JsonLines:
    """A file of one JSON object a line, each written through at once.

    Args:
        path: The file.
        keep_to_step: Lines of an earlier run with a greater ``step`` are dropped, as is a last line that was cut
            short; so a resumed run writes each step once. None starts an empty file.
    """

    def __init__(self, path: Path, keep_to_step: int | None = None) -> None:
        self.path = path
        kept = _lines_to(path, keep_to_step) if keep_to_step is not None else []
        try:
            temporary = path.with_name(f".tmp-{path.name}")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._error(error) from error

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends one object.

        Raises:
            InputError: The disk is full or not writable.
        """
        try:
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what is still in its buffer would be refused again, without a name
                self._file.close()
            raise self._error(error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _error(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written ({error.strerror})")


def _lines_to(path: Path, step: int) -> list[str]:
    """The whole lines of a log whose step is at most ``step``."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        kept.append(line + "\n")
    return kept


class RunLog:
    """The logs of a run folder, written by rank 0 alone: one line a step, an epoch, and a sample that was left out.

    Args:
        run: The run folder.
        keep_to_step: As ``JsonLines``.
        cut: Whether that step ended an epoch early: the line of the whole epoch will take the place of that one's.
        writes: Whether this process writes; the others' calls do nothing.
    """

    def __init__(self, run: Path, keep_to_step: int | None, *, cut: bool = False, writes: bool) -> None:
        keep = dict.fromkeys((METRICS_FILE, EPOCHS_FILE, SKIPPED_FILE) if writes else (), keep_to_step)
        if cut and keep_to_step is not None and writes:
            keep[EPOCHS_FILE] = keep_to_step - 1
        self._files = {Path(name).stem: JsonLines(run / name, step) for name, step in keep.items()}

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Appends one object to ``metrics``, ``epochs`` or ``skipped``.

        Raises:
            InputError: The disk is full or not writable.
        """
        if self._files:
            self._files[name].write(values)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


class TensorBoard(Callback):
    """Writes the numbers of each step as TensorBoard events; does nothing where TensorBoard is not installed."""

    def __init__(self) -> None:
        self._writer: Any = None

    def on_start(self, info: RunInfo) -> None:
        """Opens the event file; events after a resumed step are purged."""
        if info.rank != 0:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # an extra
        except ImportError:
            return
        self._writer = SummaryWriter(str(info.run / "tensorboard"), purge_step=info.start_step + 1)

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """Writes every number of a step."""
        if self._writer is not None:
            self._add("train", metrics)

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        """Writes every number of an epoch."""
        if self._writer is not None:
            self._add("epoch", metrics)

    def on_end(self, result: RunResult | None) -> None:
        """Closes the event file."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except OSError as error:  # an error here would hide the one that ended the training
            logger.warning("%s: the last events could not be written (%s)", writer.log_dir, error.strerror)

    def _add(self, group: str, metrics: Mapping[str, Any]) -> None:
        try:
            for name, value in metrics.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{group}/{name}", value, metrics["step"])
        except OSError as error:  # its own thread writes, and tells at one of the next events
            where, why = self._writer.log_dir, error.strerror
            logger.warning("%s: TensorBoard's events cannot be written (%s) and are left out from here on", where, why)
            self._writer = None


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
        self._shares = {"data": 0.0, "device": 0.0}  # of an epoch's steps, summed
        self._steps = 0

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
        self._steps += 1
        for name in self._shares:
            self._shares[name] += metrics.get(f"{name}_wait", 0.0)
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
        data, device = (share / self._steps if self._steps else 0.0 for share in self._shares.values())
        self._shares, self._steps = dict.fromkeys(self._shares, 0.0), 0
        if max(data, device) < _MUCH:
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
