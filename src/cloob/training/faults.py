"""What goes wrong during a run: signals, batches that do not come, too little
memory.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from cloob.data.batch import Batch
from cloob.distributed import Layout, gather_objects, gather_rows, host, world_size
from cloob.errors import InputError, TrainingFailed, out_of_memory
from cloob.training.config import TrainConfig
from cloob.training.generators import preserved_rng

_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


class StopRequested(Exception):  # noqa: N818
    """Some rank got a signal to end; raised on all of them at once."""


class StopSignal:
    """Turns SIGTERM into a flag that the loop looks at between steps; outside the main
    thread it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._handle(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request(self, *_: object) -> None:
        self.requested = True
        self.ignore_children()

    def _handle(self, number: signal.Signals, handler: Callable[..., None]) -> None:
        self._before.setdefault(number, signal.getsignal(number))
        signal.signal(number, handler)

    def ignore_children(self) -> None:
        """From here on a data worker's death is noticed where its batch is awaited, not
        in the middle of a step.
        """
        if self._before and signal.SIGCHLD not in self._before:
            self._handle(signal.SIGCHLD, lambda *_: None)


@dataclass(frozen=True)
class Fetched:
    """A step's batch on this rank, and what all ranks have."""

    batch: Batch
    layout: Layout  # usable samples
    bad: int  # samples that are not
    waited: float  # seconds of this rank

    @property
    def is_usable(self) -> bool:
        """Towers and loss take no empty part of a rank."""
        return min(self.layout.sizes) >= 1


def fetch(
    batches: Iterator[Batch],
    stop: StopSignal,
    device: torch.device,
    last_checkpoint: Path | None,
) -> Fetched:
    """The next batch of every rank; all of them raise the same."""
    began = time.perf_counter()
    batch: Batch | None = None
    fault: Exception | None = None
    try:
        with preserved_rng(torch.device("cpu")):
            batch = next(batches)
    except Exception as error:
        # A scheduler's SIGTERM reaches the data workers as well; the pipe to a dying
        # one may break before it is dead.
        if not (
            stop.requested and isinstance(error, RuntimeError | OSError | EOFError)
        ):
            fault = error
    waited = time.perf_counter() - began
    # only now: torch sets its own handler when the workers begin
    stop.ignore_children()

    good, bad = (len(batch), len(batch.skipped)) if batch is not None else (0, 0)
    rows = [[good, bad, int(stop.requested), int(fault is not None)]]
    if world_size() > 1:
        rows = gather_rows(
            torch.tensor(rows, device=host(device)), Layout((1,) * world_size())
        ).tolist()
    sizes, bads, stops, faults = zip(*rows, strict=True)
    if any(faults):
        _raise_fault(fault, last_checkpoint)
    if any(stops):
        raise StopRequested
    assert batch is not None
    return Fetched(batch, Layout(sizes), sum(bads), waited)


def _raise_fault(fault: Exception | None, last_checkpoint: Path | None) -> NoReturn:
    """Raises this rank's fault, else what those of other ranks say."""
    dead = _DEAD_WORKER.search(str(fault))
    message = ""
    if dead:
        message = (
            f"data worker {dead[1]} died (most often killed for want of memory: fewer"
            " --workers help)"
        )
    elif fault is not None:
        # torch wraps a worker's error in a traceback
        lines = str(fault).strip().splitlines() or [""]
        message = f"{type(fault).__name__}: {lines[-1]}"
    messages = gather_objects(message)
    if fault is not None and not dead:
        raise fault
    told = [f"rank {i}: {text}" for i, text in enumerate(messages) if text]
    told += [name_last_checkpoint(last_checkpoint), "go on with --resume auto"]
    raise TrainingFailed("; ".join(told)) from fault


def name_last_checkpoint(last: Path | None) -> str:
    return f"the last checkpoint is {last}" if last else "there is no checkpoint"


@contextlib.contextmanager
def enough_memory(config: TrainConfig) -> Iterator[None]:
    """Inside, a step that does not fit in memory is an InputError with what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        local = -(-config.batch_size // world_size())
        pairs = min(local, config.micro_batch_size or local)
        raise InputError(
            f"{pairs} pairs at a time do not fit in memory; give --micro-batch-size"
            f" {max(2, pairs // 2)} or less (the loss stays that of the full batch), a"
            " smaller --batch-size, or a smaller --model"
        ) from error
