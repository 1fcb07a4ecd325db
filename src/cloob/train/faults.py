"""What goes wrong while a run goes on: signals, samples that cannot be used, losses that are not finite."""

from __future__ import annotations

import itertools
import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from cloob.data.batch import Batch
from cloob.errors import InputError, TrainingFailed
from cloob.files import write_whole
from cloob.train.ranks import Tally, gather_objects, on_rank_zero
from cloob.train.state.checkpoint import Progress
from cloob.train.step import StepResult
from cloob.train.watch.log import RunLog

if TYPE_CHECKING:
    from cloob.train.validate import Validation

# A handful of bad samples says nothing yet about the fraction.
_ENOUGH_BAD = 20
# So many are named in each epoch: in a set of millions a fraction that is allowed would be a large file.
_NAMED = 1000
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """Some rank was told to end; raised on all of them at once."""


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
        self.ignore_children()

    def ignore_children(self) -> None:
        """From here on the death of a data worker is found where its batch is waited for.

        torch's own handler would raise wherever the main thread happens to be, in the middle of a checkpoint or of a
        step that the other ranks wait for.
        """
        if not self._before or not hasattr(signal, "SIGCHLD") or signal.SIGCHLD in self._before:
            return
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)


def fetch(batches: Iterator[Batch], stop: StopSignal) -> tuple[Batch | None, Exception | None]:
    """The next batch, or why there is none; neither when the loader broke because this run is being ended."""
    try:
        return next(batches), None
    except Exception as error:
        # A scheduler's SIGTERM reaches the data workers as well; the pipe to a dying one may break before it is dead.
        ended = stop.requested and isinstance(error, RuntimeError | EOFError | OSError)
        return None, None if ended else error


def raise_on_every_rank(fault: Exception | None, last_checkpoint: Path | None) -> NoReturn:
    """Ends the run for a batch that a rank could not get: on that rank and on those that would wait for it.

    Args:
        fault: This rank's, or None when another one has it.
        last_checkpoint: What a resumption would start from.

    Raises:
        InputError: This rank's own, if that is what it is.
        TrainingFailed: A data worker died, or another rank has the fault; the message names rank and fault.
        Exception: Any other fault of this rank, with its traceback: it is a defect of a transform or of ours.
    """
    told = [f"rank {i}: {text}" for i, text in enumerate(gather_objects(_describe(fault))) if text]
    if fault is not None and not _DEAD_WORKER.search(str(fault)):
        raise fault
    kept = f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint"
    raise TrainingFailed(f"{'; '.join(told)}; {kept}; go on with --resume auto") from fault


def _describe(fault: Exception | None) -> str:
    """One line on a fault, empty for none. torch wraps a worker's error in a traceback, whose last line says it."""
    if fault is None:
        return ""
    dead = _DEAD_WORKER.search(str(fault))
    if dead:
        return f"data worker {dead[1]} died (most often killed for want of memory: fewer --workers help)"
    last = (str(fault).strip().splitlines() or [""])[-1]
    return f"{type(fault).__name__}: {last}"


class BadSamples:
    """Counts the samples of an epoch that could not be used, and ends the run once there are too many.

    Args:
        progress: Keeps the counts, so that they survive a resumption.
        source: The source's name, for the error.
        limit: Largest fraction of bad samples.
        log: Where they are named, the first thousand of each epoch.
    """

    def __init__(self, progress: Progress, source: str, limit: float, log: RunLog) -> None:
        self.progress = progress
        self.source = source
        self.limit = limit
        self.log = log
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
        if counts.bad and self.progress.epoch_bad < _NAMED:
            self._name(batch)
        self.progress.epoch_good += counts.samples
        self.progress.epoch_bad += counts.bad
        if self.progress.epoch_bad >= _ENOUGH_BAD:
            self.check()

    def _name(self, batch: Batch) -> None:
        """Writes down which samples of all ranks were left out of the step that is about to be taken."""
        place = {"step": self.progress.step + 1, "epoch": self.progress.epoch + 1}
        for rank, skips in enumerate(gather_objects(batch.skipped)):
            for skip in skips:
                told = {"rank": rank, "key": skip.key, "reason": skip.reason, "detail": skip.detail}
                self.log.write("skipped", place | told)

    def check(self, *, ended: bool = False) -> None:
        """Compares the fraction of the epoch so far with the limit; every rank comes to the same answer.

        Args:
            ended: Whether the epoch is over: then one sample at least must have been usable, whatever the limit.

        Raises:
            InputError: It is above; the message gives each reason, how often, and an example.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        nothing = ended and bad > 0 and good == 0
        if bad <= self.limit * (good + bad) and not nothing:
            return
        reasons = self.reasons()
        examples: dict[str, str] = {}
        for part in gather_objects(self._examples):
            examples = part | examples
        told = "; ".join(f"{n} {reason} (e.g. {examples.get(reason, '?')})" for reason, n in reasons.items())
        raise InputError(
            f"{self.source}: {bad} of {good + bad} samples cannot be used, {_too_many(nothing, self.limit)}: {told}"
        )

    def reasons(self) -> dict[str, int]:
        """The epoch's bad samples by reason, over all ranks, the most frequent first."""
        total: Counter[str] = Counter()
        for part in gather_objects(self.progress.reasons):
            total.update(part)
        return dict(total.most_common())


class BadHeldOut:
    """Names the held-out pairs that cannot be used, after the first epoch, and ends the run if there are too many.

    Args:
        source: Their name, for the error.
        limit: Largest fraction of bad ones.
        log: Where they are named, the first thousand.
    """

    def __init__(self, source: str, limit: float, log: RunLog) -> None:
        self.source = source
        self.limit = limit
        self.log = log

    def check(self, found: Validation, progress: Progress) -> None:
        """Looks at a validation; every rank comes to the same answer.

        Raises:
            InputError: The fraction is above the limit, or none can be used; the message gives each reason, how
                often, and an example.
        """
        if progress.epoch == 0:
            place = {"step": progress.step, "epoch": 1, "held_out": True}
            for rank, skip in found.skipped[:_NAMED]:
                told = {"rank": rank, "key": skip.key, "reason": skip.reason, "detail": skip.detail}
                self.log.write("skipped", place | told)
        bad = len(found.skipped)
        nothing = bad > 0 and bad == found.pairs
        if bad <= self.limit * found.pairs and not nothing:
            return
        examples: dict[str, str] = {skip.reason: skip.key for _, skip in reversed(found.skipped)}
        told_all = "; ".join(f"{n} {reason} (e.g. {examples[reason]})" for reason, n in found.reasons().items())
        raise InputError(
            f"{self.source}: {bad} of {found.pairs} held-out pairs cannot be used, "
            f"{_too_many(nothing, self.limit)}: {told_all}"
        )


def _too_many(nothing: bool, limit: float) -> str:
    return "which leaves none" if nothing and limit == 1 else f"more than max_bad_fraction = {limit:g} allows"


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
    on_rank_zero(lambda: write_whole(path, json.dumps(numbers | {"keys": everywhere}, indent=2) + "\n"))
    return path, everywhere
