"""Processes that make batches, which live as long as their loader."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cloob.data.batch import Batch
from cloob.data.pairs import Pairs
from cloob.errors import InputError
from cloob.functional import private

Request = tuple[int, np.ndarray]  # the epoch, and the rows of one local batch


@dataclass(frozen=True)
class _Batches(Dataset[Batch]):
    """The batches of pairs by request; every worker has a copy."""

    pairs: Pairs

    def __getitem__(self, request: Request) -> Batch:
        epoch, rows = request
        return self.pairs.batch(rows, epoch)


# seconds from a process's broken pipe to its end; one with much memory takes a while
_DYING = 10
_AHEAD = 2  # batches of every worker that wait, torch's ``prefetch_factor``


class WorkerPool:
    """Processes with copies of the pairs, which live until ``close``; without
    ``workers`` this process.
    """

    def __init__(self, pairs: Pairs, workers: int, *, pin_memory: bool = False) -> None:
        self._batches = _Batches(pairs)
        self._workers = workers
        self._pin_memory = pin_memory
        self._requests: Iterable[Request] = ()
        self.loader: DataLoader[Batch] = DataLoader(
            self._batches,
            batch_size=None,  # the pairs make the batches
            sampler=self,
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_begin_worker,
            persistent_workers=workers > 0,
            # Else the pool would draw from the global generator, and runs would depend
            # on `workers`.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """The batches of the requests in their order, of one call at a time;
        RuntimeError when a worker dies.
        """
        if self._workers:
            yield from self._by_workers(requests)
            return
        for batch in map(self._batches.__getitem__, requests):
            yield batch.pin_memory() if self._pin_memory else batch

    def _by_workers(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """The batches of worker processes, with a clear error where one dies."""
        self._requests = requests
        with warnings.catch_warnings():
            # Python 3.12+ warns of a fork with threads; the workers take no locks
            message = ".*multi-threaded, use of fork"
            warnings.filterwarnings("ignore", message, DeprecationWarning)
            batches = iter(self.loader)
        while True:
            # torch would wait for ever where a death left half a message in the pipe
            _raise_if_dead(batches)
            try:
                batch = next(batches)
            except StopIteration:
                return
            except InputError as error:
                raise _without_traceback(error) from None
            except (EOFError, OSError, RuntimeError) as error:
                # torch asks who is dead when a pipe breaks; a killed process breaks its
                # pipes before it is dead.
                is_inside_worker = "in DataLoader worker process" in str(error)
                if not is_inside_worker:
                    _raise_if_dead(batches, _DYING, error)
                raise
            yield batch

    def close(self) -> None:
        """Ends the processes."""
        private.shut_down(self.loader)


def _without_traceback(error: InputError) -> InputError:
    """A worker's error comes with its traceback; the last line is the message."""
    last_line = str(error).strip().rsplit("\n", 1)[-1]
    kind = f"{InputError.__module__}.{InputError.__name__}: "
    return InputError(last_line.removeprefix(kind))


def _raise_if_dead(
    batches: Iterator[Batch], seconds: float = 0, cause: Exception | None = None
) -> None:
    """Waits so many seconds for a worker to end, which all live as long as the loader,
    and raises torch's error.
    """
    workers = {worker.sentinel: worker for worker in private.worker_processes(batches)}
    dead = [workers[ended] for ended in wait(workers, timeout=seconds)]
    if dead:
        for worker in dead:
            # torch's handler of SIGCHLD would raise wherever we are by then
            worker.join(_DYING)
        pids = ", ".join(str(worker.pid) for worker in dead)
        raise RuntimeError(
            f"DataLoader worker (pid(s) {pids}) exited unexpectedly"
        ) from cause


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of the group, and the main one ends the workers. The
    # training loop's handler of SIGTERM must not keep a forked worker alive.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
