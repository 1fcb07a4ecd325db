"""What this machine has for a process."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cloob.errors import InputError

if TYPE_CHECKING:
    from concurrent.futures import Future

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
_MOST_DECODERS = 16
# of a cgroup (version 2), as a container sees it
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def check_device_name(device: str) -> None:
    """Raises InputError for what no machine has; what this one has, torch knows."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise InputError(
            f"device is {device!r}; it must be auto, cpu, cuda, cuda:N or mps"
        )


def processors() -> int:
    """Processors that this process may use: those it may run on, and the share that a
    container's quota leaves.
    """
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max": no quota
        quota, period = map(int, _CPU_QUOTA.read_text(encoding="ascii").split())
        usable = min(usable, max(1, -(-quota // period)))
    return usable


def warn_of_emulated_bfloat16() -> None:
    """Warns before slow work in bfloat16 on a CPU without its instructions, by the list
    that Linux keeps.
    """
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return
    flags = set(file.read_text(encoding="utf-8", errors="replace").split())
    if flags and flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}):
        logger.warning(
            "this processor only emulates bfloat16, which takes it several times as"
            " long as float32"
        )


def local_ranks() -> int:
    """Ranks of the run on this machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(ranks)) if ranks.isdecimal() else 1


def decoders() -> int:
    """Threads that decode pictures by default: one a processor, shared by the machine's
    ranks.
    """
    return max(1, min(_MOST_DECODERS, processors() // local_ranks()))


def in_threads(
    function: Callable[[T], R], tasks: Iterable[T], workers: int, ahead: int
) -> Iterator[R]:
    """``map`` in order by threads that work at most ``ahead`` tasks early; without
    threads if ``workers`` is 0.
    """
    if workers < 1:
        yield from map(function, tasks)
        return
    from concurrent.futures import ThreadPoolExecutor

    waiting: deque[Future[R]] = deque()
    # Decoders set warning filters, which are the process's; threads that interleave
    # could leave theirs set.
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
    ):
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
