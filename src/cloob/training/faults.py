"""What goes wrong while a run goes on: signals, batches that do not come, losses that are not finite."""

from __future__ import annotations

import itertools
import json
import logging
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from cloob.data.batch import Batch
from cloob.distributed import rank, world_size
from cloob.errors import InputError, TrainingFailed
from cloob.files import write_whole
from cloob.training.config import TrainConfig
from cloob.training.ranks import Tally, gather_objects, on_rank_zero, tally
from cloob.training.state.checkpoint import Progress
from cloob.training.step import StepResult

logger = logging.getLogger(__name__)
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


def agree(
    batch: Batch | None, fault: Exception | None, stop: StopSignal, device: torch.device, last_checkpoint: Path | None
) -> tuple[Batch, Tally]:
    """A batch that ``fetch`` returned, and what all ranks have of it; every rank calls this and comes to the same.

    Raises:
        StopRequested: Some rank was told to end.
        TrainingFailed: Some rank could not get its batch, or another of the errors of ``raise_on_every_rank``.
    """
    good, bad = (len(batch), len(batch.skipped)) if batch is not None else (0, 0)
    counts = tally(good, bad, stop.requested, device, fault is not None)
    if counts.fault:
        raise_on_every_rank(fault, last_checkpoint)
    if counts.stop:
        raise StopRequested
    assert batch is not None
    return batch, counts


def raise_on_every_rank(fault: Exception | None, last_checkpoint: Path | None) -> NoReturn:
    """Ends the run for a batch that a rank (this one with ``fault``) could not get, on all that would wait for it.

    A dead data worker and another rank's fault are TrainingFailed; this rank's own is raised as it is.
    """
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
            f"(samples {some}; all in {path}); {kept}; a lower --lr or --clip-grad-norm may help"
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
