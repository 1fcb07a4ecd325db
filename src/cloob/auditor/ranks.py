"""A loss on several ranks that are threads of this process, without a process group.

The functions of ``torch.distributed`` are replaced for the time of a call; a thread is
a rank, and what it sends meets the others' at a barrier.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
SECONDS = 20.0  # a rank that waits longer waits for ever


class Ranks:
    """A process group of threads."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.calls = 0
        self._barrier = threading.Barrier(world, timeout=SECONDS)
        self._sent: list[Any] = [None] * world
        self._here = threading.local()

    def run(self, work: Callable[[int], T]) -> list[T]:
        """``work(rank)`` of every rank; raises what a rank raised."""

        def on_rank(rank: int) -> T:
            self._here.rank = rank
            try:
                return work(rank)
            except Exception:
                self._barrier.abort()
                raise

        fakes = {
            name: fake for name, fake in self._fakes().items() if hasattr(dist, name)
        }
        with (
            mock.patch.multiple(dist, **fakes),  # type: ignore[call-overload]
            ThreadPoolExecutor(self.world) as pool,
        ):
            ranks = [pool.submit(on_rank, rank) for rank in range(self.world)]
        errors = [e for e in (rank.exception() for rank in ranks) if e is not None]
        errors.sort(key=lambda e: isinstance(e, threading.BrokenBarrierError))
        if errors:  # a broken barrier is another's failure, if there is one
            raise errors[0]
        return [rank.result() for rank in ranks]

    def rank(self, group: object = None) -> int:
        """The rank of this thread; 0 of one that is none."""
        return getattr(self._here, "rank", 0)

    def exchange(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        self.calls += 1
        self._sent[self.rank()] = value
        self._barrier.wait()
        sent = list(self._sent)
        self._barrier.wait()
        return sent

    def _fakes(self) -> dict[str, Callable[..., Any]]:
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "get_rank": self.rank,
            "get_world_size": lambda group=None: self.world,
            "get_backend": lambda group=None: "nccl",
            "get_backend_config": lambda group=None: "cpu:gloo",
            "barrier": lambda *_, **__: self.exchange(None) and None,
            "all_reduce": self._all_reduce,
            "all_gather": self._all_gather,
            "all_gather_object": self._all_gather_object,
            "all_gather_single": self._all_gather_single,
            "all_gather_into_tensor": self._all_gather_single,
            "reduce_scatter": self._reduce_scatter,
            "reduce_scatter_single": self._reduce_scatter_single,
            "reduce_scatter_tensor": self._reduce_scatter_single,
        }

    def _all_reduce(
        self,
        tensor: Tensor,
        op: dist.ReduceOp.RedOpType | None = None,
        *_: object,
        **__: object,
    ) -> None:
        copy_into(tensor, reduced(self.exchange(tensor.detach().clone()), op))

    def _all_gather(
        self, outputs: list[Tensor], tensor: Tensor, *_: object, **__: object
    ) -> None:
        for output, sent in zip(outputs, self.exchange(tensor.detach()), strict=True):
            copy_into(output, sent)

    def _all_gather_object(
        self, outputs: list[object], value: object, *_: object
    ) -> None:
        outputs[:] = self.exchange(value)

    def _all_gather_single(
        self, output: Tensor, tensor: Tensor, *_: object, **__: object
    ) -> None:
        rows = torch.cat(self.exchange(tensor.detach()))
        copy_into(output, rows.reshape(output.shape))

    def _reduce_scatter(
        self,
        output: Tensor,
        inputs: list[Tensor],
        op: dist.ReduceOp.RedOpType | None = None,
        *_: object,
        **__: object,
    ) -> None:
        inputs_of_ranks = self.exchange([tensor.detach() for tensor in inputs])
        for_this_rank = [sent[self.rank()] for sent in inputs_of_ranks]
        copy_into(output, reduced(for_this_rank, op))

    def _reduce_scatter_single(
        self,
        output: Tensor,
        tensor: Tensor,
        op: dist.ReduceOp.RedOpType | None = None,
        *_: object,
        **__: object,
    ) -> None:
        self._reduce_scatter(output, list(tensor.chunk(self.world)), op)


@torch.no_grad()
def copy_into(output: Tensor, value: Tensor) -> None:
    """Writes a value into a collective's output."""
    output.copy_(value)


def reduced(sent: list[Tensor], op: dist.ReduceOp.RedOpType | None) -> Tensor:
    """The sum, or the mean, or the least, as a ``ReduceOp`` says."""
    stacked = torch.stack(sent)
    if op == dist.ReduceOp.MIN:
        return stacked.amin(dim=0)
    if op == dist.ReduceOp.AVG:
        return stacked.mean(dim=0)
    return stacked.sum(dim=0)
