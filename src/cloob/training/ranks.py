"""What the ranks of a run tell each other beside gradients: small numbers each step, objects now and then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from cloob.distributed import host, rank, world_size

T = TypeVar("T")


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
    """Inside, a rank may take up to a day, however long the process group waits; at the end each waits for all.

    One that dies ends the others' wait.
    """
    if world_size() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.barrier(group)
        dist.destroy_process_group(group)


def on_rank_zero(action: Callable[[], T], *, slow: bool = False) -> T:
    """Runs ``action()`` on rank 0 and returns its result everywhere; what it raises is raised on every rank.

    A rank that failed alone would leave the others waiting for it. ``slow``: as ``unhurried``.
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
