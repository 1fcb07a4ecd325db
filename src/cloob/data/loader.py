"""From a source to batches: the same batches for every number of workers and ranks, and after every resume.

The order of an epoch depends on (seed, epoch, number of pairs) alone, for streamed sources also on the shards' sizes
and the number of lanes. A sample's augmentation depends on (seed, epoch, its index).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cloob.data.batch import Batch
from cloob.data.builder import BatchBuilder, Request, Tokenizer, Transform
from cloob.data.mix import MixedSource
from cloob.data.order import DEFAULT_BUFFER, EpochOrder, Order, Part, local_part
from cloob.data.pool import WorkerPool
from cloob.data.source import Source
from cloob.errors import too_few_pairs


class Loader(ABC):
    """Batches epoch by epoch: of pairs (``PairLoader``), or of features that were made of them before.

    ``pairs_per_epoch`` is before ``drop_last``; an epoch is made of ``lanes`` sequences of shards.
    """

    def __init__(self, batch_size: int, pairs_per_epoch: int, *, drop_last: bool, lanes: int = 1) -> None:
        self.batch_size = batch_size
        self.pairs_per_epoch = pairs_per_epoch
        self.lanes = lanes
        self._drop_last = drop_last

    @property
    def steps_per_epoch(self) -> int:
        return self.steps()

    def steps(self, offset: int = 0) -> int:
        """Number of global batches in an epoch whose first ``offset`` pairs are left out."""
        full, rest = divmod(self.pairs_per_epoch - offset, self.batch_size)
        return full + (rest > 0 and not self._drop_last)

    def epoch(self, epoch: int, start_step: int = 0, lanes: int | None = None, *, offset: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from ``start_step`` on, as an uninterrupted epoch would give them.

        With workers, beginning another epoch ends the one before. ``lanes``: the number the epoch was begun with, when
        it goes on with another number of ranks. ``offset``: pairs to leave out before the first batch, where an epoch
        goes on with another batch size.
        """
        return self._batches(epoch, range(start_step, self.steps(offset)), lanes or self.lanes, offset)

    @abstractmethod
    def _batches(self, epoch: int, steps: range, lanes: int, offset: int) -> Iterator[Batch]: ...

    def close(self) -> None:  # noqa: B027 - for most there is nothing to end
        """Ends worker processes; the loader cannot be used afterwards."""


class PairLoader(Loader):
    """Batches of a source, epoch by epoch.

    Global batch b of an epoch is ``order[b·B : (b+1)·B]`` of ``EpochOrder``. Each rank takes every W-th pair of it
    (``local_part``), so a batch that the ranks cannot share equally gives unequal parts. Samples that cannot be used
    leave a batch smaller, even empty, and are listed in its ``skipped``.

    Args:
        transform: RGB image to ``(3, H, W)`` uint8. With a second required parameter it is called as
            ``transform(image, generator)`` with the sample's own generator (``TrainTransform``).
        tokenizer: List of n captions to ``(n, L)`` integers.
        batch_size: Pairs per global batch, over all ranks.
        drop_last: Leave out the last batch when it is smaller than ``batch_size``.
        shuffle_buffer: Read shard by shard and shuffle within so many pairs of each lane, see ``EpochOrder``; 0: one
            permutation of everything. None: 10,000 when a source is streamed, else 0.
        workers: Processes that read and decode; 0: in this one. They live as long as the loader.
        pin_memory: Hand out page-locked batches (needs CUDA; ignored without).
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        tokenizer: Tokenizer,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        shuffle_buffer: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if shuffle_buffer is None:
            shuffle_buffer = DEFAULT_BUFFER if source.streamed else 0
        sources = source.parts if isinstance(source, MixedSource) else (source,)
        parts = [Part(tuple(part.shard_sizes), part.streamed) for part in sources]
        self._order = EpochOrder(parts, seed=seed, shuffle=shuffle, buffer=shuffle_buffer)
        if len(self._order) < (batch_size if drop_last else 1):
            raise too_few_pairs(source.name, len(self._order), batch_size)
        super().__init__(batch_size, len(self._order), drop_last=drop_last, lanes=world_size)
        self.source = source
        self._ahead = -(-(shuffle_buffer or DEFAULT_BUFFER) * world_size // (2 * batch_size))
        self._rank = rank
        self._world_size = world_size
        self._builder = BatchBuilder(source, transform, tokenizer, seed)
        self._pin = pin_memory and torch.cuda.is_available()
        self._pool = WorkerPool(self._builder, workers, pin_memory=self._pin) if workers else None

    def _batches(self, epoch: int, steps: range, lanes: int, offset: int) -> Iterator[Batch]:
        requests = self._requests(epoch, self._order.epoch(epoch, lanes), steps, offset)
        if self._pool is not None:
            return self._pool.batches(requests)
        batches = map(self._builder.__getitems__, requests)
        return map(Batch.pin_memory, batches) if self._pin else batches

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _requests(self, epoch: int, order: Order, steps: range, offset: int) -> Iterator[Request]:
        prefetch = getattr(self.source, "prefetch", None) if self.source.streamed else None
        asked = steps.start
        for step in steps:
            if prefetch is not None:  # fetch the shards that this rank will soon read
                until = min(step + 1 + self._ahead, steps.stop)
                for later in range(asked, until):
                    prefetch(self._local(order, offset + later * self.batch_size))
                asked = until
            yield Request(epoch, self._local(order, offset + step * self.batch_size))

    def _local(self, order: Order, start: int) -> np.ndarray:
        """This rank's part of the global batch that begins at ``start``."""
        return order[local_part(start, min(start + self.batch_size, len(order)), self._rank, self._world_size)]


class Copies:
    """Moves batches to a device; to CUDA on a stream of their own, so that a copy overlaps the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, for work on its current stream; waits only for memory that is not pinned."""
        if self._stream is None:
            return batch.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in (moved.images, moved.tokens, moved.ids):
            tensor.record_stream(current)  # else its memory would be handed out again on the stream of the copies
        return moved
