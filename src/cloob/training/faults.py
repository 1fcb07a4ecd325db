"""What goes wrong during a run: signals, batches that do not come, too little memory, samples that cannot be used."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from cloob.data.batch import Batch, Skip
from cloob.data.loader import Loader
from cloob.distributed import Tally, gather_objects, tally, world_size
from cloob.errors import InputError, TrainingFailed, out_of_memory
from cloob.training.config import TrainConfig
from cloob.training.log import RunLog
from cloob.training.progress import Progress

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
        """From here on a data worker's death is found where its batch is waited for, not in the middle of a step."""
        if self._before and hasattr(signal, "SIGCHLD") and signal.SIGCHLD not in self._before:
            self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)


def fetch(batches: Iterator[Batch], stop: StopSignal) -> tuple[Batch | None, Exception | None]:
    """The next batch, or why there is none; neither when the loader broke because this run is being ended."""
    try:
        return next(batches), None
    except Exception as error:
        # A scheduler's SIGTERM reaches the data workers as well; the pipe to a dying one may break before it is dead.
        ended = stop.requested and isinstance(error, RuntimeError | EOFError | OSError)
        return None, None if ended else error


def agree(
    batch: Batch | None, fault: Exception | None, stop: StopSignal, device: torch.device, last_checkpoint: Path | None
) -> tuple[Batch, Tally]:
    """The fetched batch and its sizes on all ranks; StopRequested and TrainingFailed are raised on every rank."""
    good, bad = (len(batch), len(batch.skipped)) if batch is not None else (0, 0)
    counts = tally(good, bad, stop.requested, device, fault is not None)
    if counts.fault:
        dead = _DEAD_WORKER.search(str(fault))
        last = (str(fault).strip().splitlines() or [""])[-1]  # torch wraps a worker's error in a traceback
        told = "" if fault is None else f"{type(fault).__name__}: {last}"
        if dead:
            told = f"data worker {dead[1]} died (most often killed for want of memory: fewer --workers help)"
        of_ranks = gather_objects(told)
        if fault is not None and not dead:
            raise fault
        where = "; ".join(f"rank {i}: {text}" for i, text in enumerate(of_ranks) if text)
        raise TrainingFailed(f"{where}; {kept(last_checkpoint)}; go on with --resume auto") from fault
    if counts.stop:
        raise StopRequested
    assert batch is not None
    return batch, counts


def kept(last: Path | None) -> str:
    return f"the last checkpoint is {last}" if last else "there is no checkpoint"


@contextlib.contextmanager
def enough_memory(config: TrainConfig) -> Iterator[None]:
    """Inside, not enough memory for a step is an InputError that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        local = -(-config.run.batch_size // world_size())
        pairs = min(local, config.run.micro_batch_size or local)
        less = f"--micro-batch-size {max(2, pairs // 2)} or less (the loss stays that of the whole batch)"
        helps = f"{less}, a smaller --batch-size, or a smaller --model"
        raise InputError(f"{pairs} pairs at a time do not fit in memory; give {helps}") from error


MIN_BAD = 20  # fewer bad samples say nothing yet about the fraction
MAX_BAD_IN_A_ROW = 1000
"""So many without a usable one in between: a mount that has died, not one of many files that is bad."""
MAX_NAMED = 1000
"""Bad samples that are named in an epoch: in a set of millions a fraction that is allowed would be a large file."""
Read = tuple[int, Skip]  # a sample that could not be used, with the rank that read it


class BadSamples:
    """Counts the samples of an epoch that could not be used, by reason; ends a run of more than the share ``limit``."""

    def __init__(self, progress: Progress, loader: Loader, limit: float, log: RunLog) -> None:
        self.progress, self.loader, self.limit, self.log = progress, loader, limit, log
        self._in_a_row = 0
        self._examples: dict[str, str] = {}

    def count(self, batch: Batch, counts: Tally) -> None:
        progress = self.progress
        for skip in batch.skipped:
            progress.reasons[skip.reason] = progress.reasons.get(skip.reason, 0) + 1
            self._examples.setdefault(skip.reason, _example(skip))
        if counts.bad and progress.epoch_bad < MAX_NAMED:
            place = {"step": progress.step + 1, "epoch": progress.epoch + 1}
            name_skips(self.log, place, with_readers(batch.skipped))
        progress.epoch_good += counts.samples
        progress.epoch_bad += counts.bad
        self._in_a_row = 0 if counts.samples else self._in_a_row + counts.bad
        if progress.epoch_bad >= MIN_BAD:
            self.check()

    def check(self, *, ended: bool = False) -> None:
        """Compares the bad samples with the limit; every rank comes to the same answer.

        They are a fraction of the whole epoch, since the rest of it may be good; once it has ``ended``, or very many in
        a row were bad, of the epoch so far. At its end one sample at least must have been usable, whatever the limit.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        so_far = ended or self._in_a_row >= MAX_BAD_IN_A_ROW
        total = good + bad if so_far else max(good + bad, self.loader.pairs_per_epoch)
        nothing = ended and bad > 0 and good == 0
        if bad > self.limit * total or nothing:
            what = f"{self.loader.name}: {bad} of {good + bad} samples"
            _refuse(what, nothing, self.limit, self.reasons(), ChainMap(*gather_objects(self._examples)))

    def reasons(self) -> dict[str, int]:
        return dict(sum(map(Counter, gather_objects(self.progress.reasons)), Counter[str]()).most_common())


def with_readers(skipped: Sequence[Skip]) -> list[Read]:
    return [(reader, skip) for reader, part in enumerate(gather_objects(skipped)) for skip in part]


def by_reason(skipped: Iterable[Read]) -> dict[str, int]:
    return dict(Counter(skip.reason for _, skip in skipped).most_common())


def name_skips(log: RunLog, place: Mapping[str, Any], skipped: Sequence[Read]) -> None:
    for reader, skip in skipped[:MAX_NAMED]:
        log.write("skipped", {**place, "rank": reader, "key": skip.key, "reason": skip.reason, "detail": skip.detail})


def check_fraction(source: str, kind: str, skips: Sequence[Skip], total: int, limit: float) -> None:
    """Raises InputError where more than a share of a whole set cannot be used, or all of it; with an example each."""
    bad = len(skips)
    nothing = bad > 0 and bad == total
    if bad > limit * total or nothing:
        examples: dict[str, str] = {skip.reason: _example(skip) for skip in reversed(skips)}
        reasons = by_reason((0, skip) for skip in skips)
        _refuse(f"{source}: {bad} of {total} {kind}", nothing, limit, reasons, examples)


def _example(skip: Skip) -> str:
    return f"{skip.key}: {skip.detail}" if skip.detail else skip.key


def _refuse(
    what: str, nothing: bool, limit: float, reasons: Mapping[str, int], examples: Mapping[str, str]
) -> NoReturn:
    why = "which leaves none" if nothing and limit == 1 else f"more than max_bad_fraction = {limit:g} allows"
    listed = "; ".join(f"{n} {reason} (e.g. {examples.get(reason, '?')})" for reason, n in reasons.items())
    raise InputError(f"{what} cannot be used, {why}: {listed}")
