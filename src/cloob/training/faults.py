"""What goes wrong while a run goes on: bad samples, signals, batches that do not come, losses that are not finite."""

from __future__ import annotations

import itertools
import json
import logging
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from cloob.data.batch import Batch, Skip
from cloob.distributed import rank, world_size
from cloob.errors import InputError, TrainingFailed
from cloob.files import write_whole
from cloob.training.config import TrainConfig
from cloob.training.course import Progress
from cloob.training.ranks import Tally, gather_objects, on_rank_zero, tally
from cloob.training.step import StepResult
from cloob.training.watch.log import RunLog

logger = logging.getLogger(__name__)
MIN_BAD = 20
"""Fewer bad samples say nothing yet about the fraction."""
MAX_BAD_IN_A_ROW = 1000
"""So many without a usable one in between: a mount that has died, not one of many files that is bad."""
MAX_NAMED = 1000
"""Bad samples that are named in an epoch: in a set of millions a fraction that is allowed would be a large file."""
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class BadSamples:
    """Counts the samples of an epoch that could not be used, by reason; ends the run once there are too many.

    ``progress`` keeps the counts, so that they survive a resumption; ``limit`` is the largest fraction of bad samples,
    ``pairs`` the samples of a whole epoch.
    """

    def __init__(self, progress: Progress, source: str, limit: float, pairs: int, log: RunLog) -> None:
        self.progress = progress
        self.source = source
        self.limit = limit
        self.pairs = pairs
        self.log = log
        self._in_a_row = 0
        self._warned = -1  # the epoch
        self._examples: dict[str, str] = {}

    def count(self, batch: Batch, counts: Tally) -> None:
        """Takes note of a batch; once ``MIN_BAD`` samples were bad, errors as of ``check``."""
        progress = self.progress
        for skip in batch.skipped:
            progress.reasons[skip.reason] = progress.reasons.get(skip.reason, 0) + 1
            self._examples.setdefault(skip.reason, _example(skip))
        if counts.bad and progress.epoch_bad < MAX_NAMED:
            place = {"step": progress.step + 1, "epoch": progress.epoch + 1}
            for reader, skips in enumerate(gather_objects(batch.skipped)):
                name_skips(self.log, place, [(reader, skip) for skip in skips[:MAX_NAMED]])
        progress.epoch_good += counts.samples
        progress.epoch_bad += counts.bad
        self._in_a_row = 0 if counts.samples else self._in_a_row + counts.bad
        if progress.epoch_bad >= MIN_BAD:
            self.check()
            self._warn()

    def _warn(self) -> None:
        """Warns once an epoch that more are bad so far than may be of the whole."""
        good, bad, epoch = self.progress.epoch_good, self.progress.epoch_bad, self.progress.epoch
        if bad > self.limit * (good + bad) and self._warned != epoch:
            self._warned = epoch
            if rank() == 0:
                logger.warning(
                    "%s: %d of %d samples so far cannot be used; the run ends when more than %d of an epoch cannot",
                    *(self.source, bad, good + bad, int(self.limit * self.pairs)),
                )

    def check(self, *, ended: bool = False) -> None:
        """Compares the bad samples with the limit; every rank comes to the same answer.

        They are a fraction of the whole epoch, since the rest of it may be good. Once the epoch has ``ended``, or very
        many in a row were bad, they are one of the epoch so far. At its end one sample at least must have been usable,
        whatever the limit.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        total = good + bad if ended or self._in_a_row >= MAX_BAD_IN_A_ROW else max(good + bad, self.pairs)
        nothing = ended and bad > 0 and good == 0
        if bad <= self.limit * total and not nothing:
            return
        reasons = self.reasons()
        examples: dict[str, str] = {}
        for part in gather_objects(self._examples):
            examples = part | examples
        raise _too_many(f"{self.source}: {bad} of {good + bad} samples", nothing, self.limit, reasons, examples)

    def reasons(self) -> dict[str, int]:
        """The epoch's bad samples by reason, over all ranks, the most frequent first."""
        total: Counter[str] = Counter()
        for part in gather_objects(self.progress.reasons):
            total.update(part)
        return dict(total.most_common())


def name_skips(log: RunLog, place: Mapping[str, Any], skips: Sequence[tuple[int, Skip]]) -> None:
    """Writes to ``skipped.jsonl`` which samples were left out, with the rank that read each."""
    for reader, skip in skips:
        log.write("skipped", {**place, "rank": reader, "key": skip.key, "reason": skip.reason, "detail": skip.detail})


def check_fraction(source: str, kind: str, skips: Sequence[Skip], total: int, limit: float) -> None:
    """Raises InputError where more than a share of a whole set cannot be used, or all of it; with an example each."""
    bad = len(skips)
    nothing = bad > 0 and bad == total
    if bad <= limit * total and not nothing:
        return
    reasons: dict[str, int] = dict(Counter(skip.reason for skip in skips).most_common())
    examples: dict[str, str] = {skip.reason: _example(skip) for skip in reversed(skips)}
    raise _too_many(f"{source}: {bad} of {total} {kind}", nothing, limit, reasons, examples)


def _example(skip: Skip) -> str:
    return f"{skip.key}: {skip.detail}" if skip.detail else skip.key


def _too_many(
    what: str, nothing: bool, limit: float, reasons: Mapping[str, int], examples: Mapping[str, str]
) -> InputError:
    why = "which leaves none" if nothing and limit == 1 else f"more than max_bad_fraction = {limit:g} allows"
    listed = "; ".join(f"{n} {reason} (e.g. {examples.get(reason, '?')})" for reason, n in reasons.items())
    return InputError(f"{what} cannot be used, {why}: {listed}")


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


def agree(
    batch: Batch | None, fault: Exception | None, stop: StopSignal, device: torch.device, last_checkpoint: Path | None
) -> tuple[Batch, Tally]:
    """A batch that ``fetch`` returned, and what all ranks have of it; every rank calls this and comes to the same.

    Raises:
        StopRequested: Some rank was told to end.
        TrainingFailed: A data worker died, or another rank could not get its batch; this rank's own fault is raised
            as it is.
    """
    good, bad = (len(batch), len(batch.skipped)) if batch is not None else (0, 0)
    counts = tally(good, bad, stop.requested, device, fault is not None)
    if counts.fault:
        _raise_on_every_rank(fault, last_checkpoint)
    if counts.stop:
        raise StopRequested
    assert batch is not None
    return batch, counts


def _raise_on_every_rank(fault: Exception | None, last_checkpoint: Path | None) -> NoReturn:
    faults = [f"rank {i}: {text}" for i, text in enumerate(gather_objects(_describe(fault))) if text]
    if fault is not None and not _DEAD_WORKER.search(str(fault)):
        raise fault
    kept = f"the last checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint"
    raise TrainingFailed(f"{'; '.join(faults)}; {kept}; go on with --resume auto") from fault


def _describe(fault: Exception | None) -> str:
    """One line on a fault, empty for none. torch wraps a worker's error in a traceback, whose last line says it."""
    if fault is None:
        return ""
    dead = _DEAD_WORKER.search(str(fault))
    if dead:
        return f"data worker {dead[1]} died (most often killed for want of memory: fewer --workers help)"
    last = (str(fault).strip().splitlines() or [""])[-1]
    return f"{type(fault).__name__}: {last}"


def skip_nonfinite(
    config: TrainConfig,
    progress: Progress,
    result: StepResult,
    step: int,
    lr: float,
    keys: tuple[str, ...],
    last: Path | None,
) -> None:
    """Writes the samples of all ranks in a step that was not finite to ``nonfinite-step-N.json``.

    ``max_nonfinite`` such steps in a row are TrainingFailed, which names the ``last`` checkpoint.
    """
    progress.nonfinite += 1
    all_keys = list(itertools.chain.from_iterable(gather_objects(keys)))
    path = config.save.out / f"nonfinite-step-{step}.json"
    numbers: dict[str, Any] = {"step": step, "epoch": progress.epoch + 1, "loss": str(result.loss)}
    numbers |= {"grad_norm": str(result.grad_norm), "lr": lr, "keys": all_keys}
    on_rank_zero(lambda: write_whole(path, json.dumps(numbers, indent=2) + "\n"))
    if progress.nonfinite >= config.run.max_nonfinite:
        some = ", ".join(all_keys[:3]) + (", …" if len(all_keys) > 3 else "")
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint"
        raise TrainingFailed(
            f"step {step}: loss or gradient not finite for {progress.nonfinite} steps in a row "
            f"(samples {some}; all in {path}); {kept}; a lower --lr or clipping (clip_grad_norm) may help"
        )
    if rank() == 0:
        logger.warning("step %d: loss or gradient not finite, step skipped; samples in %s", step, path)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says that there is not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "could not create a memory object" in str(error)


def too_large(config: TrainConfig) -> InputError:
    """The error of a step for which there was not enough memory."""
    local = -(-config.run.batch_size // world_size())
    pairs = min(local, config.run.micro_batch_size or local)
    return InputError(
        f"{pairs} pairs at a time do not fit in memory; give --micro-batch-size {max(2, pairs // 2)} or less (the loss "
        f"stays that of the whole batch), a smaller --batch-size, or a smaller --model"
    )
