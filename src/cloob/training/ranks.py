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
    """One step's batch over all ranks."""

    sizes: tuple[int, ...]  # usable samples of each
    bad: int
    stop: bool
    fault: bool

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    @property
    def smallest(self) -> int:
        return min(self.sizes)


def tally(samples: int, bad: int, stop: bool, device: torch.device, fault: bool = False) -> Tally:
    """Adds up the ranks' batches and agrees on whether to stop, or to end for a fault: all get the same answer."""
    if world_size() == 1:
        return Tally((samples,), bad, stop, fault)
    here = torch.tensor([samples, bad, int(stop), int(fault)], device=host(device))
    parts = [torch.empty_like(here) for _ in range(world_size())]
    dist.all_gather(parts, here)
    sizes, bads, stops, faults = zip(*torch.stack(parts).tolist(), strict=True)
    return Tally(sizes, sum(bads), any(stops), any(faults))


def gather_objects(value: T) -> list[T]:
    """The value of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def collect_objects(value: T) -> list[T]:
    """The value of every rank, in the order of ranks, on rank 0; nothing elsewhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, values if rank() == 0 else None, dst=0)
    return values


@contextlib.contextmanager
def no_timeout() -> Iterator[None]:
    """Inside, ranks may work past the process group's timeout, up to a day; a barrier at the end."""
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
    """``action()`` of rank 0 everywhere; what it raises is raised on every rank, as one alone would be waited for."""
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    with no_timeout() if slow else contextlib.nullcontext():
        if rank() == 0:
            try:
                outcome = [action(), None]
            except Exception as error:
                outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return cast(T, result)
