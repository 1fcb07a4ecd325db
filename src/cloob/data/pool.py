"""The worker processes of a loader: batches in the order of the requests, and a death that is found at once."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from cloob.data.batch import Batch
from cloob.data.builder import BatchBuilder, Request
from cloob.errors import InputError

# Seconds that a process may take from its broken pipe to its end; one that held much memory takes a while.
_DYING = 10
MAX_MEMORY = 4 * 1024**3  # bytes that a worker may take beyond those it begins with


class WorkerPool:
    """Processes that live until ``close``, each with a copy of the builder."""

    def __init__(self, builder: BatchBuilder, workers: int, *, pin_memory: bool) -> None:
        self._requests: Iterable[Request] = ()
        self._begun = 0
        self._loader: DataLoader[Any] = DataLoader(
            builder,
            batch_sampler=self,  # type: ignore[arg-type] # any iterable of requests
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            worker_init_fn=_begin_worker,
            persistent_workers=True,
            # Its own generator: else the pool would draw from the global one, and runs would depend on `workers`.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def close(self) -> None:
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """The batches of the requests in their order; of one call at a time.

        RuntimeError: a worker died, in torch's words; or another call was begun.
        """
        self._begun += 1
        mine = self._begun
        self._requests = requests
        with warnings.catch_warnings():
            # Python 3.12+ warns of any fork with threads about; the workers only run our code, which takes no locks.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            batches = iter(self._loader)
        while True:
            _raise_if_dead(batches)  # torch would wait for ever where a death left half a message in the pipe
            try:
                batch = next(batches)
            except StopIteration:
                return
            except InputError as error:  # a worker's comes with its traceback: the last line is the message
                said = str(error).strip().rsplit("\n", 1)[-1]
                raise InputError(said.removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")) from None
            except (EOFError, OSError, RuntimeError) as error:
                # torch asks who is dead when a pipe breaks; a killed process breaks its pipes before it is dead.
                if "in DataLoader worker process" not in str(error):  # which is an error of the worker's own
                    _raise_if_dead(batches, _DYING, error)
                raise
            yield batch
            if mine != self._begun:
                raise RuntimeError("another epoch of this loader was begun while this one was being read")


def _raise_if_dead(batches: Any, seconds: float = 0, cause: Exception | None = None) -> None:
    """Waits so many seconds for a worker to end, and raises in torch's own words; all live as long as the loader."""
    workers = {worker.sentinel: worker for worker in batches._workers}
    dead = [workers[ended] for ended in wait(workers, timeout=seconds)]
    for worker in dead:
        worker.join(_DYING)  # its SIGCHLD is over then: torch's handler of it would raise wherever we are by that time
    if dead:
        pids = ", ".join(str(worker.pid) for worker in dead)
        raise RuntimeError(f"DataLoader worker (pid(s) {pids}) exited unexpectedly") from cause


def _as_is(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group: ending the workers is the main process's business. And a handler that the
    # training loop has set for SIGTERM must not keep a forked worker alive.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # a picture that takes gigabytes costs one bad sample; mapped files do not count
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
        held = next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        wanted = held * 1024 + MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))
