"""From a source or a torch ``Dataset`` to batches: the same for every number of workers
and ranks, and after a resume.

A sample's augmentation, and the generators that a Dataset's item draws from, depend on
(seed, epoch, index).
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    default_collate,
    get_worker_info,
)

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
    ShardSizes,
    sample_generator,
)
from cloob.data.sampler import SamplerOrder
from cloob.data.source import Fingerprint, MixedSource, Source
from cloob.data.transforms import TrainTransform
from cloob.errors import InputError, counted, one_line
from cloob.functional import private
from cloob.functional.ids import ids as ids_of
from cloob.machine import local_ranks
from cloob.pictures import Encoded

Transform = TrainTransform | Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Request = tuple[int, np.ndarray]  # the epoch, and the rows of one local batch

_PROBED = 100  # items of a Dataset among which one that can be used is searched
# seconds from a process's broken pipe to its end; one with much memory takes a while
_DYING = 10
# pairs that are read before they are decoded: 3 to 10 % faster, as decoding empties the
# caches
_TOGETHER = 16
# bytes that a worker may take beyond those it begins with; shared batches do not count
MAX_MEMORY = 4 * 1024**3
SHARED_MEMORY = Path(
    "/dev/shm"
)  # where workers leave their batches; a container has 64 MB of it by default
_WAITING = 2  # batches of every worker that wait there, torch's ``prefetch_factor``
_MORE_SHARED = (
    "give the container more (docker run --shm-size 8g), a smaller --batch-size, or"
    " --workers 0"
)
_TOO_MUCH = "takes more memory than a data worker may"


class Loader:
    """This rank's batches epoch by epoch: every W-th pair of a global batch, of which
    ``batch_size`` is the size.
    """

    # whether held-out pairs of one id are one answer; else every pair is its own
    by_id = False
    _pool: WorkerPool | None = None  # of those that make batches of single items

    def __init__(
        self,
        name: str,
        order: EpochOrder | SamplerOrder,
        batch_size: int,
        *,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        n = len(order)
        if n < (batch_size if drop_last else 1):
            larger = (
                f", fewer than one batch of {batch_size:,}; give --batch-size {n:,} or"
                " less"
            )
            wrong = larger if n > 1 else "; at least 2 training pairs are needed"
            raise InputError(f"{name} holds {counted(n, 'pairs')}{wrong}")
        self.name, self.batch_size, self.lanes = name, batch_size, world_size
        self.pairs_per_epoch = n  # before ``drop_last``
        self._order, self._drop_last, self._rank, self._world_size = (
            order,
            drop_last,
            rank,
            world_size,
        )

    @property
    def steps_per_epoch(
        self,
    ) -> int:  # of a batch size that may still be unknown when pairs are opened
        return self.steps()

    def steps(self, offset: int = 0) -> int:
        """Number of global batches in an epoch whose first ``offset`` pairs are left
        out.
        """
        full, rest = divmod(self.pairs_per_epoch - offset, self.batch_size)
        return full + (rest > 0 and not self._drop_last)

    def epoch(
        self,
        epoch: int,
        start_step: int = 0,
        lanes: int | None = None,
        *,
        offset: int = 0,
    ) -> Iterator[Batch]:
        """The batches of one epoch, from ``start_step`` on, as an uninterrupted epoch
        would give them.

        With workers, beginning another epoch ends the one before. ``lanes``: the number
        the epoch was begun with, when it goes on with another number of ranks.
        ``offset``: pairs to leave out before the first batch, where an epoch goes on
        with another batch size.
        """
        rows_at, size = self._order.epoch(epoch, lanes or self.lanes), self.batch_size

        def rows(
            start: int,
        ) -> np.ndarray:  # those whose positions are ``rank`` modulo ``world_size``
            first = start + (self._rank - start) % self._world_size
            return rows_at(
                np.arange(
                    first, min(start + size, self.pairs_per_epoch), self._world_size
                )
            )

        return self._batches(
            epoch,
            range(offset + start_step * size, offset + self.steps(offset) * size, size),
            rows,
        )

    def _batches(
        self, epoch: int, starts: range, rows: Callable[[int], np.ndarray]
    ) -> Iterator[Batch]:
        """``rows`` are this rank's of the global batch that begins at a position of the
        epoch.
        """
        assert self._pool is not None
        return self._pool.batches(self._requests(epoch, starts, rows))

    def _requests(
        self, epoch: int, starts: range, rows: Callable[[int], np.ndarray]
    ) -> Iterator[Request]:
        return ((epoch, rows(start)) for start in starts)

    def order_state(self, position: int) -> Any:
        """What the order of an epoch depends on beside the seed, when a run stands at
        this position of it: a sampler's state.
        """
        if not isinstance(self._order, SamplerOrder):
            return None
        return self._order.state(at_the_beginning=position > 0)

    def load_order(self, state: Any) -> None:
        """Takes back what ``order_state`` gave."""
        if isinstance(self._order, SamplerOrder):
            self._order.load(state)

    def close(self) -> None:
        """Ends worker processes; the loader cannot be used afterwards."""
        if self._pool is not None:
            private.shut_down(self._pool.loader)


class PairLoader(Loader):
    """Batches of a source.

    Samples that cannot be used leave a batch smaller, even empty, and are in its
    ``skipped``.

    ``transform`` gives ``(3, H, W)`` uint8 of one size, ``tokenizer`` ``(n, L)`` of n
    captions. ``shuffle_buffer``: read shard by shard, shuffled within so many pairs of
    a lane; 0: one permutation of everything; None: 10,000 when a source is streamed,
    else 0. ``workers`` live as long as the loader; 0: this process. ``by_picture``:
    rows of one picture are one pair of an epoch, with a caption drawn from (seed,
    epoch, picture) where ``transform`` is a ``TrainTransform``, else the first.
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
        by_picture: bool = False,
    ) -> None:
        if shuffle_buffer is None:
            shuffle_buffer = DEFAULT_BUFFER if source.streamed else 0
        sources = source.parts if isinstance(source, MixedSource) else (source,)
        parts, pictures = (
            [ShardSizes(tuple(part.shard_sizes), part.streamed) for part in sources],
            None,
        )
        if by_picture and (same := source.pictures()) is not None:
            pictures = Pictures(same, list(map(len, sources)))
            counted_parts = zip(parts, pictures.counts, strict=True)
            parts = [
                part if count == sum(part.shard_sizes) else ShardSizes((count,))
                for part, count in counted_parts
            ]
        order = EpochOrder(parts, seed=seed, shuffle=shuffle, buffer=shuffle_buffer)
        super().__init__(
            source.name,
            order,
            batch_size,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        self.source = source
        self._ahead = -(
            -(shuffle_buffer or DEFAULT_BUFFER) * world_size // (2 * batch_size)
        )
        self._pictures = pictures
        builder = BatchBuilder(source, transform, tokenizer, seed, pictures)
        batch_bytes = builder.image_bytes * -(-batch_size // world_size)
        pin_memory = pin_memory and torch.cuda.is_available()
        self._pool = WorkerPool(builder, workers, batch_bytes, pin_memory=pin_memory)

    def _requests(
        self, epoch: int, starts: range, rows: Callable[[int], np.ndarray]
    ) -> Iterator[Request]:
        soon = iter(starts if self.source.streamed else ())
        for i, start in enumerate(starts):
            for later in islice(
                soon, 1 if i else 1 + self._ahead
            ):  # this rank's shards of the batches to come
                soon_read = rows(later)
                if self._pictures is not None:
                    soon_read = self._pictures.firsts[soon_read]
                self.source.prefetch(soon_read)
            yield epoch, rows(start)


class BatchBuilder(Dataset[Batch]):
    """Reads, decodes, augments and tokenises the pairs of a batch; every worker has a
    copy.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        tokenizer: Tokenizer,
        seed: int,
        pictures: Pictures | None,
    ) -> None:
        self._source, self._transform, self._tokenizer = source, transform, tokenizer
        self._seed, self._pictures = seed, pictures
        self._drawn = seed if isinstance(transform, TrainTransform) else None
        # What an empty batch looks like has to be known before the first good sample.
        random = [torch.Generator()] if isinstance(transform, TrainTransform) else []
        self._no_images = transform(Image.new("RGB", (32, 32)), *random)[None][:0]
        self._no_tokens = tokenizer(["a"])[:0]
        self.image_bytes = (
            math.prod(self._no_images.shape[1:]) * self._no_images.element_size()
        )

    def __getitem__(self, request: Request) -> Batch:
        epoch, indices = request
        images = self._room(len(indices))
        good, skipped = list[RawSample](), list[Skip]()
        for start in range(0, len(indices), _TOGETHER):
            opened: list[tuple[int, RawSample, Encoded]] = []
            for index in indices[start : start + _TOGETHER].tolist():
                with _skipping(f"{self._source.name}: pair {index + 1:,}", skipped):
                    opened.append((index, *self._open(index, epoch)))
            for index, sample, encoded in opened:
                with _skipping(sample.key, skipped), decoding(sample.key):
                    images[len(good)] = self._pixels(index, epoch, encoded)
                    good.append(sample)
        captions = [sample.caption for sample in good]
        tokens = self._tokenizer(captions) if captions else self._no_tokens
        ids = torch.tensor(list(map(caption_id, captions)), dtype=torch.int64)
        return Batch(
            (images[: len(good)], tokens.to(torch.int64)),
            ids,
            tuple(sample.key for sample in good),
            tuple(skipped),
        )

    def _room(self, rows: int) -> Tensor:
        """Room for so many pictures: in a worker in shared memory, as torch's
        ``default_collate`` takes it.
        """
        images = self._no_images.new_empty(0)
        if get_worker_info() is not None and rows:
            try:
                images.set_(private.shared_storage(rows * self.image_bytes))
            except RuntimeError as error:
                raise InputError(
                    f"{SHARED_MEMORY} is full ({error}); {_MORE_SHARED}"
                ) from None
        return images.resize_(rows, *self._no_images.shape[1:])

    def _open(self, index: int, epoch: int) -> tuple[RawSample, Encoded]:
        """The pair of an epoch's row, and its picture, opened but not decoded."""
        row = index
        if self._pictures is not None:
            row = self._pictures.row(index, self._drawn, epoch)
        sample = self._source.read(row)
        with decoding(sample.key):
            return sample, Encoded(sample.image)

    def _pixels(self, index: int, epoch: int, encoded: Encoded) -> Tensor:
        if not isinstance(self._transform, TrainTransform):
            return self._transform(encoded.rgb())
        # The crop comes first: then a JPEG need not be decoded in more detail than it
        # takes.
        generator = sample_generator(self._seed, epoch, index)
        crop = self._transform.draw(*encoded.size, generator, encoded.orientation)
        return self._transform.take(encoded.rgb(crop.reduction, upright=False), crop)


@contextmanager
def _skipping(key: str, skipped: list[Skip]) -> Iterator[None]:
    try:
        yield
    except BadSample as bad:
        skipped.append(bad.skip)
    except MemoryError:  # a worker's memory is bounded
        skipped.append(Skip(key, "image too large", _TOO_MUCH))


class WorkerPool:
    """Processes with copies of the builder, which live until ``close``; without
    ``workers`` this process.
    """

    def __init__(
        self,
        builder: Dataset[Batch],
        workers: int,
        batch_bytes: int,
        *,
        pin_memory: bool = False,
    ) -> None:
        if workers and SHARED_MEMORY.is_dir():
            space, ranks = os.statvfs(SHARED_MEMORY), local_ranks()
            free, needed = (
                space.f_bavail * space.f_frsize,
                (_WAITING * workers + 2) * batch_bytes * ranks,
            )
            if needed > free:
                processes = f"{counted(workers, 'workers')}{f' of {ranks} ranks' if ranks > 1 else ''}"
                sizes = (
                    f"{free / 1e6:,.1f} MB free, the batches of {processes} need"
                    f" {needed / 1e6:,.1f} MB"
                )
                raise InputError(f"{SHARED_MEMORY}: {sizes}; {_MORE_SHARED}")
        self._builder, self._workers, self._pin = builder, workers, pin_memory
        self._requests: Iterable[Request] = ()
        self.loader: DataLoader[Any] = DataLoader(
            builder,
            batch_size=None,  # the builder makes the batches
            sampler=self,
            num_workers=workers,
            prefetch_factor=_WAITING if workers else None,
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
        if not self._workers:
            for batch in map(self._builder.__getitem__, requests):
                yield batch.pin_memory() if self._pin else batch
            return
        self._requests = requests
        with (
            warnings.catch_warnings()
        ):  # Python 3.12+ warns of a fork with threads; the workers take no locks
            warnings.filterwarnings(
                "ignore",
                message=".*multi-threaded, use of fork",
                category=DeprecationWarning,
            )
            batches = iter(self.loader)
        while True:
            _raise_if_dead(
                batches
            )  # torch would wait for ever where a death left half a message in the pipe
            try:
                batch = next(batches)
            except StopIteration:
                return
            # a worker's comes with its traceback: the last line is the message
            except InputError as error:
                message = str(error).strip().rsplit("\n", 1)[-1]
                raise InputError(
                    message.removeprefix(
                        f"{InputError.__module__}.{InputError.__name__}: "
                    )
                ) from None
            except (EOFError, OSError, RuntimeError) as error:
                # torch asks who is dead when a pipe breaks; a killed process breaks its
                # pipes before it is dead.
                if "in DataLoader worker process" not in str(
                    error
                ):  # which is an error inside the worker
                    _raise_if_dead(batches, _DYING, error)
                raise
            yield batch


def _raise_if_dead(
    batches: Any, seconds: float = 0, cause: Exception | None = None
) -> None:
    """Waits so many seconds for a worker to end, which all live as long as the loader,
    and raises torch's error.
    """
    workers = {worker.sentinel: worker for worker in private.worker_processes(batches)}
    if dead := [workers[ended] for ended in wait(workers, timeout=seconds)]:
        for worker in dead:
            worker.join(
                _DYING
            )  # torch's handler of SIGCHLD would raise wherever we are by then
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
    if (
        sys.platform == "linux"
    ):  # a picture that takes gigabytes costs one bad sample; mapped files do not count
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
        used = next(
            int(line.split()[1]) for line in lines if line.startswith("VmData:")
        )
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = used * 1024 + MAX_MEMORY
        resource.setrlimit(
            resource.RLIMIT_DATA, (limit if most < 0 else min(limit, most), most)
        )


class Items:
    """A ``Dataset`` as training knows its pairs: a name, a length, and a fingerprint of
    what an item looks like.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset: Any = dataset
        self.name = type(dataset).__name__
        whole: Any = dataset
        while isinstance(whole, Subset):  # as of random_split
            whole = whole.dataset
        self.collate: Callable[[list[Any]], Any] = (
            getattr(whole, "collate_fn", None) or default_collate
        )
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"{self.name}: has no length; a map-style Dataset is needed, with"
                " __len__ and __getitem__"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> Fingerprint:
        """The number of pairs and the kind of the first that can be used: contents may
        be drawn anew every time.
        """
        first = self.first()
        kinds = _kind(first)
        if isinstance(first, tuple | list):
            kinds = str([_kind(part) for part in first])
        return {"pairs": len(self), "kinds of items": kinds}

    def first(self) -> Any:
        """The first item that can be used; None where there is none among the first
        hundred.
        """
        items = map(
            partial(_ItemBuilder(self, 0).item, 0), range(min(len(self), _PROBED))
        )
        return next((item for item in items if not isinstance(item, Skip)), None)


class ItemLoader(Loader):
    """This rank's batches of a ``Dataset``; ``train``: a new order in every epoch,
    without the last, smaller batch.

    ``whole``: an item may be a mapping, or a tuple of any length, for towers or a loss
    that take the whole batch. ``order``: of a sampler.
    """

    by_id = True

    def __init__(
        self,
        items: Items,
        batch_size: int,
        *,
        seed: int,
        train: bool,
        rank: int,
        world_size: int,
        workers: int,
        whole: bool = False,
        order: SamplerOrder | None = None,
    ) -> None:
        default = EpochOrder([ShardSizes((len(items),))], seed=seed, shuffle=train)
        super().__init__(
            items.name,
            order if order is not None else default,
            batch_size,
            drop_last=train,
            rank=rank,
            world_size=world_size,
        )
        first = items.first() if workers else None
        tensors = [] if first is None else tensors_of(items.collate([first]))
        batch_bytes = sum(tensor.nbytes for tensor in tensors) * -(
            -batch_size // world_size
        )
        builder = _ItemBuilder(items, seed, whole)
        self._pool = WorkerPool(builder, workers, batch_bytes)


@dataclass(frozen=True)
class _ItemBuilder(Dataset[Batch]):
    items: Items
    seed: int
    whole: bool = False

    def item(self, epoch: int, index: int) -> Any:
        """An item, or the Skip of one that raised."""
        number = sample_generator(self.seed, epoch, index).initial_seed() % 2**32
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        torch.default_generator.manual_seed(number)
        try:
            return self.items.dataset[index]
        except Exception as error:
            return Skip(
                str(index),
                "item raised an error",
                f"{type(error).__name__}: {one_line(error)}",
            )

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch:
        epoch, indices = request
        rows, items, skipped = list[int](), list[Any](), list[Skip]()
        for index in indices.tolist():  # a sampler may give a row twice
            item = self.item(epoch, index)
            if isinstance(item, Skip):
                skipped.append(item)
            else:
                rows.append(index)
                items.append(item)
        if not items:
            nothing = (torch.empty(0), torch.empty(0))
            no_ids = torch.empty(0, dtype=torch.int64)
            return Batch(nothing, no_ids, (), tuple(skipped))
        parts, ids = self._collated(items)
        if ids is None:
            ids = torch.tensor(rows)
        return Batch(parts, ids, tuple(map(str, rows)), tuple(skipped))

    def _collated(self, items: list[Any]) -> tuple[Any, Tensor | None]:
        """The parts of a batch, and its ids if items have any."""
        name = self.items.name
        try:
            parts = self.items.collate(items)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{name}: items cannot be collated ({one_line(error)}); an item is (a,"
                " b) or (a, b, id), and the Dataset may have a collate_fn"
            ) from error
        if isinstance(parts, Mapping):
            ids = parts.get("id")
        elif isinstance(parts, tuple | list):
            parts = tuple(parts)
            ids = parts[2] if len(parts) > 2 else None
        else:
            raise InputError(
                f"{name}: items are collated to {type(parts).__name__}; a tuple or a"
                " mapping is expected"
            )
        if not self.whole:
            parts = self._two_sides(parts)
        return parts, None if ids is None else self._ids(ids)

    def _two_sides(self, parts: Any) -> tuple[Any, Any]:
        if isinstance(parts, Mapping):
            what = f"the names {', '.join(map(str, parts))}"
        elif len(parts) in (2, 3):
            return parts[0], parts[1]
        else:
            what = f"{len(parts)} parts"
        raise InputError(
            f"{self.items.name}: an item has {what}; (a, b) or (a, b, id) is expected"
            " where neither towers nor loss take `batch`"
        )

    def _ids(self, collated: Any) -> Tensor:
        """(n,) int64 ids, of integers or texts."""
        if not isinstance(collated, Tensor):
            return ids_of(collated)
        if collated.is_floating_point() or collated.is_complex():
            raise InputError(
                f"{self.items.name}: ids are {collated.dtype}; integers or texts are"
                " expected"
            )
        return collated.to(torch.int64)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return str({key: _kind(part) for key, part in value.items()})
    return type(value).__name__


class Copies:
    """Moves batches to a device; to CUDA on a separate stream, so that a copy overlaps
    the step before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

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
            tensor.record_stream(
                current
            )  # else its memory would be handed out again on the stream of the copies
        return moved
