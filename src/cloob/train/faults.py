"""What goes wrong while a run goes on: signals, samples that cannot be used, losses that are not finite."""

from __future__ import annotations

import itertools
import json
import signal
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from cloob.data.batch import Batch
from cloob.errors import InputError
from cloob.train.build import write_text
from cloob.train.checkpoint import Progress
from cloob.train.ranks import Tally, gather_objects, on_rank_zero
from cloob.train.step import StepResult

# A handful of bad samples says nothing yet about the fraction.
_ENOUGH_BAD = 20


class StopSignal:
    """Turns SIGTERM into a flag that the loop looks at between steps; outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # Schedulers signal the data workers too; torch would turn their death into an exception in mid-step.
        if hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in self._before:
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)


class BadSamples:
    """Counts the samples of an epoch that could not be used, and ends the run once there are too many.

    Args:
        progress: Keeps the counts, so that they survive a resumption.
        source: The source's name, for the error.
        limit: Largest fraction of bad samples.
    """

    def __init__(self, progress: Progress, source: str, limit: float) -> None:
        self.progress = progress
        self.source = source
        self.limit = limit
        self._examples: dict[str, str] = {}

    def count(self, batch: Batch, counts: Tally) -> None:
        """Takes note of a batch.

        Raises:
            InputError: As ``check``, once 20 samples were bad.
        """
        reasons = self.progress.reasons
        for skip in batch.skipped:
            reasons[skip.reason] = reasons.get(skip.reason, 0) + 1
            self._examples.setdefault(skip.reason, f"{skip.key}: {skip.detail}" if skip.detail else skip.key)
        self.progress.epoch_good += counts.samples
        self.progress.epoch_bad += counts.bad
        if self.progress.epoch_bad >= _ENOUGH_BAD:
            self.check()

    def check(self) -> None:
        """Compares the fraction of the epoch so far with the limit; every rank comes to the same answer.

        Raises:
            InputError: It is above; the message gives each reason, how often, and an example.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        if bad <= self.limit * (good + bad):
            return
        reasons = self.reasons()
        examples: dict[str, str] = {}
        for part in gather_objects(self._examples):
            examples = part | examples
        told = "; ".join(f"{n} {reason} (e.g. {examples.get(reason, '?')})" for reason, n in reasons.items())
        raise InputError(
            f"{self.source}: {bad} of {good + bad} samples cannot be used, "
            f"more than max_bad_fraction = {self.limit:g} allows: {told}"
        )

    def reasons(self) -> dict[str, int]:
        """The epoch's bad samples by reason, over all ranks, the most frequent first."""
        total: Counter[str] = Counter()
        for part in gather_objects(self.progress.reasons):
            total.update(part)
        return dict(total.most_common())


def report_nonfinite(
    run: Path, step: int, epoch: int, lr: float, result: StepResult, keys: tuple[str, ...]
) -> tuple[Path, list[str]]:
    """Writes ``nonfinite-step-N.json`` with the keys of all ranks' samples.

    Returns:
        The file and the keys.

    Raises:
        InputError: The folder cannot be written.
    """
    everywhere = list(itertools.chain.from_iterable(gather_objects(keys)))
    path = run / f"nonfinite-step-{step}.json"
    numbers = {"step": step, "epoch": epoch, "loss": str(result.loss), "grad_norm": str(result.grad_norm), "lr": lr}
    on_rank_zero(lambda: write_text(path, json.dumps(numbers | {"keys": everywhere}, indent=2) + "\n"))
    return path, everywhere
