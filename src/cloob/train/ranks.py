"""What the ranks of a run tell each other beside gradients: small numbers each step, objects now and then."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cloob.distributed import host, rank, world_size

T = TypeVar("T")
_MEET_SECONDS = 30.0  # far less than any process group waits


@dataclass(frozen=True)
class Tally:
    """One step's batch over all ranks; ``sizes`` are the usable samples of each."""

    samples: int
    smallest: int
    bad: int
    stop: bool
    fault: bool = False
    sizes: tuple[int, ...] = ()


def tally(samples: int, bad: int, stop: bool, device: torch.device, fault: bool = False) -> Tally:
    """Adds up the ranks' batches and agrees on whether to stop, or to end for a fault: all get the same answer."""
    if world_size() == 1:
        return Tally(samples, samples, bad, stop, fault, (samples,))
    counts_here = torch.tensor([samples, bad, int(stop), int(fault)], device=host(device))
    parts = [torch.empty_like(counts_here) for _ in range(world_size())]
    dist.all_gather(parts, counts_here)
    rows = torch.stack(parts).tolist()
    counts, bads, stops, faults = zip(*rows, strict=True)
    return Tally(sum(counts), min(counts), sum(bads), any(stops), any(faults), counts)


def gather_objects(value: T) -> list[T]:
    """The value of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Inside, a rank may take longer than the process group waits for one; at the end each waits for all.

    A thread of each rank meets those of the others every now and then, so that one that dies is noticed as ever, and
    one that hangs is not. Nothing else inside may talk to other ranks. In a group of NCCL alone, whose collectives
    belong to a thread's device, the group's own patience is all there is.
    """
    if world_size() == 1 or "cpu:" not in dist.get_backend_config():
        yield
        return
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        meetings = pool.submit(_meet, ended)
        try:
            yield
        finally:
            ended.set()
    meetings.result()


def _meet(ended: threading.Event) -> None:
    while not all(gather_objects(ended.wait(_MEET_SECONDS))):
        pass


def on_rank_zero(action: Callable[[], T], *, slow: bool = False) -> T:
    """Runs ``action()`` on rank 0 and returns its result everywhere; what it raises is raised on every rank.

    A rank that failed alone would leave the others waiting for it.

    Args:
        action: What is done there.
        slow: It may take longer than the process group waits; should it hang, that is not noticed.
    """
    outcome: Any = (None, None)
    with unhurried() if slow else contextlib.nullcontext():
        if rank() == 0:
            try:
                outcome = (action(), None)
            except Exception as error:
                if world_size() == 1:
                    raise
                outcome = (None, error)
    result, failure = broadcast_object(outcome)
    if failure is not None:
        raise failure
    return cast(T, result)
