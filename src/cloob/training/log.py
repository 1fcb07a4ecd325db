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
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from cloob.distributed import on_rank_zero
from cloob.errors import InputError, one_line, require
from cloob.files import write_whole
from cloob.models.runs import EPOCHS_FILE, METRICS_FILE, SKIPPED_FILE
from cloob.training.callbacks import Callback, RunInfo, RunResult

logger = logging.getLogger(__name__)
MIN_WAIT = 0.3  # the share of an epoch's time from which waiting for data or for the device is worth a word


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


class RunLog:
    """The JSON lines of a run folder, written through at once; those after ``keep_to_step`` are dropped (None: all)."""

    def __init__(self, run: Path, keep_to_step: int | None, *, writes: bool) -> None:
        self._files: dict[str, TextIO] = {}
        for name in (METRICS_FILE, EPOCHS_FILE, SKIPPED_FILE) if writes else ():
            path = run / name
            write_whole(path, "".join(_lines_to(path, keep_to_step)))
            self._files[path.stem] = path.open("a", encoding="utf-8")

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
        for file in self._files.values():
            file.close()


def _lines_to(path: Path, step: int | None) -> list[str]:
    """The whole lines of a log whose step is at most ``step``; none without one."""
    kept: list[str] = []
    if step is not None and path.is_file():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if json.loads(line)["step"] > step:
                    break
                kept.append(line + "\n")
    return kept


class ProgressDisplay(Callback):
    """Shows loss, images per second and the time left: a bar on a terminal, plain lines elsewhere; rank 0 only."""

    def __init__(self, *, title: str = "train", every_seconds: float = 10.0) -> None:
        self.title = title
        self.every_seconds = every_seconds  # between plain lines
        self._info: RunInfo | None = None
        self._bar: Any = None
        self._say: Callable[[str], object] = partial(print, file=sys.stderr, flush=True)
        self._rate = 0.0
        self._began = self._last = 0.0
        self._done = 0
        self._waits: dict[str, list[float]] = {"data": [], "device": []}  # shares of an epoch's steps

    def on_start(self, info: RunInfo) -> None:
        if info.rank != 0:
            return
        self._info = info
        self._began = self._last = time.perf_counter()
        # A bar drawn into a log file is noise; so is one on a terminal that cannot move its cursor.
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _rich_bar()
            self._say = partial(self._bar.console.print, highlight=False, markup=False, soft_wrap=True)
            steps = {"total": info.total_steps, "completed": info.start_step}
            self._task = self._bar.add_task(self.title, **steps, loss="-", rate="-")
            self._bar.start()

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        if self._info is None:
            return
        self._done += 1
        for name, shares in self._waits.items():
            shares.append(metrics.get(f"{name}_wait", 0.0))
        step, total, speed = metrics["step"], self._info.total_steps, metrics["images_per_second"]
        self._rate = speed if self._rate == 0 else 0.9 * self._rate + 0.1 * speed
        loss, rate = _loss(metrics, "skipped"), f"{self._rate:.0f}"
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, rate=rate)
        elif self._done == 1 or now - self._last >= self.every_seconds:
            self._last = now
            left = timedelta(seconds=round((now - self._began) / self._done * (total - step)))
            epoch = metrics["epoch"]
            self._say(f"{self.title}: step {step}/{total}, epoch {epoch}, loss {loss}, {rate} pairs/s, {left} left")

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        if self._info is None:
            return
        said = f"{self.title}: epoch {metrics['epoch']} done, mean loss {_loss(metrics, '-')}"
        if metrics.get("val_loss") is not None:
            said += f", validation loss {metrics['val_loss']:.4f}"
        if metrics.get("val_recall") is not None:
            said += f", mean recall {100 * metrics['val_recall']:.1f} %"
        if lost := sum(metrics.get("val_skipped", {}).values()):
            said += f" (without {lost} held-out pairs, named in skipped.jsonl)"
        data, device = (sum(shares) / max(1, len(shares)) for shares in self._waits.values())
        self._waits = {name: [] for name in self._waits}
        if device > max(data, MIN_WAIT):
            said += f", {device:.0%} of the time waiting for the device (data keep up)"
        elif data >= MIN_WAIT:
            advice = "more --workers, a faster disk or smaller pictures help"
            said += f", {data:.0%} of the time waiting for data ({advice})"
        if metrics["skipped"]:
            skipped = ", ".join(f"{count} {reason}" for reason, count in metrics["skipped"].items())
            said += f"; skipped samples (named in skipped.jsonl): {skipped}"
        self._say(said)

    def on_end(self, result: RunResult | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def _loss(metrics: Mapping[str, Any], without: str) -> str:
    return without if metrics["loss"] is None else f"{metrics['loss']:.4f}"


def _rich_bar() -> Any:
    from rich.console import Console  # for terminals alone
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # likewise

    loss, rate = TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[rate]} pairs/s")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), loss, rate, TimeRemainingColumn()
    return Progress(*columns, TextColumn("left"), console=Console(stderr=True))


class Tracker(Callback):
    """Passes numbers of rank 0 to ``sink``, and at the end to ``finish`` whether the run failed; warns if it fails."""

    sink: Any = None
    finish: Any = None

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self._log("train", metrics)

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        self._log("epoch", metrics)

    def _log(self, group: str, metrics: Mapping[str, Any]) -> None:
        numbers = {f"{group}/{name}": v for name, v in metrics.items() if name != "step" and isinstance(v, int | float)}
        self._try("sink", numbers, metrics["step"])

    def on_end(self, result: RunResult | None) -> None:
        self._try("finish", result is None)  # an error here would hide the one that ended the training

    def _try(self, action: str, *arguments: object) -> None:
        if self.sink is None:
            return
        try:
            getattr(self, action)(*arguments)
        except Exception as error:  # whatever a client raises when its server or disk is gone
            said = "%s failed (%s) and is left out from here on; metrics.jsonl goes on"
            logger.warning(said, type(self).__name__, error)
            self.sink = None


class TensorBoard(Tracker):
    """TensorBoard events; does nothing where TensorBoard is not installed. Those after a resumed step are purged."""

    def on_start(self, info: RunInfo) -> None:
        with contextlib.suppress(ImportError):  # an extra
            from torch.utils.tensorboard import SummaryWriter

            if info.rank == 0:
                writer = SummaryWriter(str(info.run / "tensorboard"), purge_step=info.start_step + 1)

                def write(numbers: Mapping[str, float], step: int) -> None:
                    for name, value in numbers.items():
                        writer.add_scalar(name, value, step)  # its own thread writes, and raises at one of the next

                self.sink, self.finish = write, lambda failed: writer.close()


class WandB(Tracker):
    """Weights & Biases. A resumed run continues there by an id in the run folder; logged steps stay as they were."""

    def __init__(self, project: str) -> None:
        self.project = project
        self._module: Any = require("wandb", "wandb")  # on every rank: an error on one alone would leave the others

    def on_start(self, info: RunInfo) -> None:
        on_rank_zero(lambda: self._begin(info))

    def _begin(self, info: RunInfo) -> None:
        file = info.run / "wandb.json"
        if info.start_step == 0 or not file.is_file():
            write_whole(file, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        known = {"id": json.loads(file.read_text(encoding="utf-8"))["id"], "resume": "allow", "name": info.run.name}
        try:
            run = self._module.init(project=self.project, config=info.config.to_dict(), dir=str(info.run), **known)
        except Exception as error:  # whatever a client raises without a login or a server
            raise InputError(f"wandb: {one_line(error)}; log in there, or leave --wandb out") from error
        self.sink = lambda numbers, step: run.log(numbers, step=step)
        self.finish = lambda failed: run.finish(exit_code=int(failed))
