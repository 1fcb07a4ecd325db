"""The steps of a run and what came of them: in its progress, in its log and at its callbacks, in their order.

Where the device works by itself, the numbers of a step stay there until a line of measurements is due, a checkpoint is
written or the epoch ends. Then those of all steps since are read at once, which waits for the device, and the lines are
those that they would be if each had been waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cloob.training import faults
from cloob.training.parts import Parts
from cloob.training.step import Launched, StepResult
from cloob.training.watch.metrics import is_due, step_metrics


@dataclass(frozen=True)
class Taken:
    """A step that was taken, or left out for too few samples (``outcome`` None)."""

    step: int
    lr: float
    hopfield: bool
    samples: int  # usable, over all ranks
    keys: tuple[str, ...]  # of this rank
    began: float  # by time.perf_counter
    waited: float  # seconds, for its batch
    outcome: Launched | None


class Ledger:
    """Accounts for the steps; every rank has one. ``notify`` is called with each line of ``metrics.jsonl``."""

    def __init__(self, parts: Parts, notify: Callable[[Mapping[str, Any]], None]) -> None:
        self.parts = parts
        self.notify = notify
        self.last_loss: float | None = None  # of the last step that was not skipped
        self._open: list[Taken] = []

    def add(self, taken: Taken) -> None:
        """Records a step. Its numbers are read now, or later in one batch so as not to stall a GPU."""
        due = is_due(self.parts.config, taken.step)
        if taken.outcome is not None and not due:
            taken.outcome.features = None  # the rows of one batch are looked at, those of many would fill the memory
        self._open.append(taken)
        if due or not self.parts.stepper.late:
            self.settle()

    def settle(self) -> None:
        """Reads what the steps since the last time came to; waits once for the device, if there are any.

        Raises:
            TrainingFailed: ``max_nonfinite`` steps in a row were not finite; the message names the last.
            InputError: The run folder cannot be written.
        """
        steps, self._open = self._open, []
        if not steps:
            return
        asked = time.perf_counter()
        results = _read(steps)
        answered = time.perf_counter()
        lines = [self._line(taken, result) for taken, result in zip(steps, results, strict=True)]
        elapsed = time.perf_counter() - steps[0].began
        shared = {
            "images_per_second": sum(taken.samples for taken in steps) / elapsed,
            "data_wait": sum(taken.waited for taken in steps) / elapsed,
        }
        if self.parts.stepper.late:
            shared["device_wait"] = (answered - asked) / elapsed
        for taken, result, line in zip(steps, results, lines, strict=True):
            self._enter(taken, result, line | shared)

    def _line(self, taken: Taken, result: StepResult | None) -> dict[str, Any]:
        """Moves the progress by a step; returns what the log says of it."""
        parts, progress = self.parts, self.parts.progress
        if result is not None and result.finite:
            self.last_loss = result.loss
            progress.samples_seen += taken.samples
            progress.loss_sum += result.loss
            progress.loss_steps += 1
        return step_metrics(parts, result, taken.step, taken.lr, hopfield=taken.hopfield)

    def _enter(self, taken: Taken, result: StepResult | None, line: dict[str, Any]) -> None:
        """Writes the line, and does what has to be done about a step that was not finite."""
        parts, progress = self.parts, self.parts.progress
        if result is None:
            line["skipped"] = "too few usable samples"
        elif not result.finite:
            line["skipped"] = "overflow" if result.overflow else "not finite"
        parts.log.write("metrics", line)
        self.notify(line)
        if result is None or result.overflow:
            return
        if result.finite:
            progress.nonfinite = 0
        else:
            faults.skip_nonfinite(parts.config, progress, result, taken.step, taken.lr, taken.keys, parts.saver.last)


def _read(steps: Sequence[Taken]) -> list[StepResult | None]:
    """What the steps came to; all numbers that are on the device come in one copy."""
    outcomes = [taken.outcome for taken in steps]
    launched = [outcome.numbers for outcome in outcomes if outcome is not None]
    rows = iter(torch.stack(launched).tolist() if launched else ())
    return [outcome.result(next(rows)) if outcome is not None else None for outcome in outcomes]
