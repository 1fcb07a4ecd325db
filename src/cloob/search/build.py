"""Reads the files of a plan, embeds bytes that have no vector yet, and writes them."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import BadSample
from cloob.machine import in_threads
from cloob.models.encoder import DualEncoder, evaluating
from cloob.pictures import Encoded, Unreadable
from cloob.search.dates import date_of, is_date
from cloob.search.matrix import Vectors
from cloob.search.plan import Summary, Task
from cloob.search.records import FileState, IndexedModel, Item, Progress
from cloob.search.scan.collection import ReadFailed
from cloob.search.store import Store


@dataclass(frozen=True, eq=False)
class Prepared:
    """A file that was read: an item, with pixels if its bytes have no vector; or a
    fault.
    """

    task: Task
    item: Item | None = None
    pixels: Tensor | None = None
    fault: str = ""
    is_transient: bool = False  # so what is known of the file stays


@dataclass
class Builder:
    """Reads, embeds and writes pictures.

    Every batch is a transaction: the next update goes on after the last one. On a CPU
    the decoding threads rest while the model runs: one picture next to a matrix product
    slows all its threads.
    """

    store: Store
    model: IndexedModel
    encoder: Callable[[], DualEncoder]
    summary: Summary
    batch_size: int
    # locked while the model runs on a CPU
    _running: threading.Lock = field(default_factory=threading.Lock)

    def run(self, tasks: Sequence[Task], workers: int, progress: Progress) -> None:
        """Reads the files of the tasks in threads, and embeds and writes them batch by
        batch.
        """
        waiting: list[Prepared] = []
        n_decoded = 0
        ahead = 2 * self.batch_size
        results = in_threads(self._prepare, tasks, workers, ahead)
        for count, prepared in enumerate(results, 1):
            waiting.append(prepared)
            n_decoded += prepared.pixels is not None
            is_full = n_decoded >= self.batch_size
            is_long = len(waiting) >= 4 * self.batch_size
            if is_full or is_long or count == len(tasks):
                self._write(waiting)
                waiting = []
                n_decoded = 0
            if progress is not None:
                progress(count, len(tasks))

    def _prepare(self, task: Task) -> Prepared:
        """Opens one picture, in any thread; decodes it only if its bytes have no vector
        yet.
        """
        with self._running:  # waits for it
            pass
        try:
            data = task.collection.read(task.found)
            encoded = Encoded(data)
            item = self._describe(task, data, encoded)
            if self.store.having([item.content]):
                return Prepared(task, item)
            pixels = self.encoder().preprocess(encoded.rgb())
        except (BadSample, Unreadable) as bad:
            fault = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason
            is_transient = isinstance(bad, ReadFailed)
            return Prepared(task, fault=fault, is_transient=is_transient)
        if encoded.truncated:
            self.summary.left_out.add("truncated JPEG, taken", item.path)
        return Prepared(task, item, pixels)

    def _describe(self, task: Task, data: bytes, encoded: Encoded) -> Item:
        """The item of a picture: its digest, size, date, caption and columns."""
        found = task.found
        caption, columns = task.collection.describe(found)
        stated = columns.get("date")
        if not is_date(stated):
            example = f"{found.path} ({stated})"
            self.summary.left_out.add("date that cannot be read", example)
        taken, origin = date_of(found.path, stated, encoded.exif)
        width, height = encoded.full_size
        return Item(
            id=0,
            source=task.collection.name,
            path=found.path,
            content=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
            mtime_ns=found.mtime_ns,
            width=width,
            height=height,
            date=taken,
            caption=caption,
            columns=columns,
            date_from=origin,
        )

    def _write(self, batch: Sequence[Prepared]) -> None:
        """Embeds what is new of a batch, and writes all of it."""
        vectors = self._embed_new(batch)
        bad = {hash_ for hash_, row in vectors.items() if not np.isfinite(row).all()}
        items = []
        for prepared in batch:
            item = prepared.item
            if item is None:
                self._write_fault(prepared)
            elif item.content in bad:
                self._write_fault(Prepared(prepared.task, fault="embedding not finite"))
            else:
                items.append(item)
                self.summary.add_item(prepared.task.state, item)
        for content in bad:
            del vectors[content]
        if items:
            self.store.write(items, self.model, vectors)

    def _embed_new(self, batch: Sequence[Prepared]) -> dict[str, Vectors]:
        """Vectors by content; bytes that got one meanwhile are not embedded again."""
        pixels = {
            prepared.item.content: prepared.pixels
            for prepared in batch
            if prepared.item is not None and prepared.pixels is not None
        }
        for content in self.store.having(list(pixels)):
            del pixels[content]
        self.summary.embedded += len(pixels)
        if not pixels:
            return {}
        rows = self._embed(torch.stack(list(pixels.values())))
        return dict(zip(pixels, rows, strict=True))

    def _embed(self, pixels: Tensor) -> Vectors:
        """(n, D) rows of pixels; on the CPU one batch at a time."""
        encoder = self.encoder()
        device = torch.device(getattr(encoder, "device", "cpu"))
        alone = self._running if device.type == "cpu" else contextlib.nullcontext()
        with alone, evaluating(encoder):
            features = encoder.encode_image(pixels.to(device))
        rows: Vectors = features.float().cpu().numpy()
        return rows

    def _write_fault(self, prepared: Prepared) -> None:
        """Notes a file that cannot be read; what is known of one that can be read later
        stays.
        """
        found, before = prepared.task.found, prepared.task.state
        self.summary.add_fault(prepared.fault, found.path)
        if prepared.is_transient and before is not None and before.id is not None:
            return
        state = FileState(
            found.path, found.bytes or 0, found.mtime_ns, fault=prepared.fault
        )
        if state != before:
            self.store.write_fault(prepared.task.collection.name, state)
