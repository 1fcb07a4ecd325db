"""From pairs to batches: the same for every number of workers and ranks, and after a
resume.

A sample's augmentation depends on (seed, epoch, index).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from cloob.data.batch import (
    BadSample,
    Batch,
    RawSample,
    Skip,
    caption_id,
    decoding,
    tensors_of,
)
from cloob.data.order import (
    DEFAULT_BUFFER,
    EpochOrder,
    Pictures,
    Rows,
    RowsAt,
    ShardSizes,
    sample_generator,
)
from cloob.data.pairs import Pairs
from cloob.data.sampler import SamplerOrder
from cloob.data.source import Fingerprint, Source
from cloob.data.transforms import TrainTransform
from cloob.data.workers import WorkerPool
from cloob.errors import InputError, counted
from cloob.functional import private
from cloob.pictures import Encoded

Transform = TrainTransform | Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]


class Loader:
    """This rank's batches epoch by epoch: every W-th pair of a global batch, of which
    ``batch_size`` is the size.

    Pairs that cannot be used leave a batch smaller, even empty, and are in its
    ``skipped``. ``order``: that of a sampler, in place of a new one in every epoch that
    depends on ``seed``. ``shuffle_buffer``: read shard by shard, shuffled within so
    many pairs of a lane; 0: one permutation of everything; None: 10,000 where reading
    in random order is costly, else 0. ``workers`` live as long as the loader; 0: this
    process.
    """

    def __init__(
        self,
        pairs: Pairs,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        shuffle_buffer: int | None = None,
        order: SamplerOrder | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if shuffle_buffer is None:
            shuffle_buffer = DEFAULT_BUFFER if pairs.streamed else 0
        drawn = EpochOrder(pairs.parts, seed, shuffle, shuffle_buffer)
        self.order: EpochOrder | SamplerOrder = order or drawn
        n = len(self.order)
        if n < (batch_size if drop_last else 1):
            fault = "; at least 2 training pairs are needed"
            if n > 1:
                fault = (
                    f", fewer than one batch of {batch_size:,}; give --batch-size {n:,}"
                    " or less"
                )
            raise InputError(f"{pairs.name} holds {counted(n, 'pairs')}{fault}")
        self.pairs = pairs
        self.batch_size = batch_size
        self.world_size = world_size
        self.pairs_per_epoch = n  # before ``drop_last``
        self._drop_last = drop_last
        self._rank = rank
        pairs_ahead = (shuffle_buffer or DEFAULT_BUFFER) * world_size
        self._batches_ahead = math.ceil(pairs_ahead / (2 * batch_size))
        pin_memory = pin_memory and torch.cuda.is_available()
        self._pool = WorkerPool(pairs, workers, pin_memory=pin_memory)

    @property
    def steps_per_epoch(self) -> int:
        """Of a batch size that may still be unknown when pairs are opened."""
        return self.steps()

    def steps(self, start: int = 0) -> int:
        """Number of global batches in what is left of an epoch behind its first
        ``start`` pairs.
        """
        full, rest = divmod(self.pairs_per_epoch - start, self.batch_size)
        return full + (rest > 0 and not self._drop_last)

    def epoch(
        self, epoch: int, start: int = 0, lanes: int | None = None
    ) -> Iterator[Batch]:
        """The batches of one epoch behind its first ``start`` pairs.

        Only the epoch that was asked for last gives batches. ``lanes``: the number of
        ranks with which the epoch was begun, where it goes on with another.
        """
        rows = self._rows(epoch, start, lanes or self.world_size)
        if self.pairs.streamed:
            rows = self._prefetched(rows)
        return self._pool.batches((epoch, batch_rows) for batch_rows in rows)

    def _rows(self, epoch: int, start: int, lanes: int) -> Iterator[np.ndarray]:
        """This rank's rows of every batch that is left."""
        rows_at = self.order.epoch(epoch, lanes)
        end = start + self.steps(start) * self.batch_size
        places = range(start, end, self.batch_size)
        return (self._local_rows(rows_at, place) for place in places)

    def _local_rows(self, rows_at: RowsAt, start: int) -> np.ndarray:
        """This rank's rows of the global batch that begins at a position of the epoch:
        those whose positions are ``rank`` modulo ``world_size``.
        """
        first = start + (self._rank - start) % self.world_size
        end = min(start + self.batch_size, self.pairs_per_epoch)
        return rows_at(np.arange(first, end, self.world_size))

    def _prefetched(self, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The rows of every batch, each some batches after the pairs were told of
        them.
        """
        ahead: deque[np.ndarray] = deque()
        for rows in batches:
            self.pairs.prefetch(rows)
            ahead.append(rows)
            if len(ahead) > self._batches_ahead:
                yield ahead.popleft()
        yield from ahead

    def close(self) -> None:
        """Ends worker processes; the loader cannot be used afterwards."""
        self._pool.close()


class PicturePairs(Pairs):
    """The pictures of a source and their captions, as towers take them.

    Rows of one picture are one pair, with a caption drawn from (seed, epoch, picture)
    where ``transform`` is a ``TrainTransform``, else the first. ``transform`` gives
    ``(3, H, W)`` uint8 of one size, ``tokenizer`` ``(n, L)`` of n captions.
    """

    by_id = False

    def __init__(
        self, source: Source, transform: Transform, tokenizer: Tokenizer, seed: int = 0
    ) -> None:
        self.name, self.streamed = source.name, source.streamed
        self._source, self._transform, self._tokenizer = source, transform, tokenizer
        self._seed = seed
        first_rows = source.first_rows()
        self._pictures = Rows() if first_rows is None else Pictures(first_rows)
        # What an empty batch looks like has to be known before the first good sample.
        blank = Image.new("RGB", (32, 32))
        self._caption_seed: int | None = None
        if isinstance(transform, TrainTransform):
            self._caption_seed = seed
            pixels = transform(blank, torch.Generator())
        else:
            pixels = transform(blank)
        self._no_images = pixels[None][:0]
        self._no_tokens = tokenizer(["a"])[:0]

    @property
    def parts(self) -> tuple[ShardSizes, ...]:
        return self._pictures.parts(self._source.parts)

    def __len__(self) -> int:
        return sum(sum(part.shard_sizes) for part in self.parts)

    def fingerprint(self) -> Fingerprint:
        return self._source.fingerprint()

    def groups(self) -> np.ndarray:
        first_rows = self._pictures.first_rows(np.arange(len(self)))
        return self._source.groups().take(first_rows)

    def prefetch(self, rows: np.ndarray, /) -> None:
        self._source.prefetch(self._pictures.first_rows(rows))

    def batch(self, rows: np.ndarray, epoch: int = 0) -> Batch:
        """Reads, decodes, augments and tokenises."""
        images = self._room(len(rows))
        good: list[RawSample] = []
        skipped: list[Skip] = []
        for index in rows.tolist():
            try:
                row = self._pictures.row(index, self._caption_seed, epoch)
                sample = self._source.read(row)
                # the row of a bad one is written over by the next
                images[len(good)] = self._pixels(index, epoch, sample)
                good.append(sample)
            except BadSample as bad:
                skipped.append(bad.skip)
        captions = [sample.caption for sample in good]
        tokens = self._tokenizer(captions) if captions else self._no_tokens
        return Batch(
            (images[: len(good)], tokens.to(torch.int64)),
            torch.tensor(list(map(caption_id, captions)), dtype=torch.int64),
            tuple(sample.key for sample in good),
            tuple(skipped),
        )

    def _room(self, rows: int) -> Tensor:
        """Room for so many pictures: in a worker in shared memory, as torch's
        ``default_collate`` takes it; a queue that finds no room would wait for ever.
        """
        shape = (rows, *self._no_images.shape[1:])
        images = self._no_images.new_empty(0)
        if get_worker_info() is not None and rows:
            n_bytes = math.prod(shape) * images.element_size()
            try:
                images.set_(private.shared_storage(n_bytes))
            except RuntimeError as error:
                raise InputError(
                    f"shared memory is full ({error}); give the container more (docker"
                    " run --shm-size 8g), a smaller --batch-size, or --workers 0"
                ) from None
        return images.resize_(shape)

    def _pixels(self, index: int, epoch: int, sample: RawSample) -> Tensor:
        """A picture's pixels for the towers; in training with the random crop of its
        epoch.
        """
        with decoding(sample.key):
            encoded = Encoded(sample.image)
            if not isinstance(self._transform, TrainTransform):
                return self._transform(encoded.rgb())
            generator = sample_generator(self._seed, epoch, index)
            return self._transform.crop_of(encoded, generator)


class Copies:
    """Moves batches to a device; to CUDA on a separate stream, so that a copy overlaps
    the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, for work on its current stream; waits only for
        memory that is not pinned.
        """
        if self._stream is None:
            return batch.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in tensors_of(moved.parts, moved.ids):
            # else its memory would be handed out again on the stream of the copies
            tensor.record_stream(current)
        return moved
