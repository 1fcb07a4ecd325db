"""``Index.update``: compares the sources with the index, reads what is new, embeds
bytes that have no vector yet, and writes it all batch by batch.

torch is imported where something has to be embedded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloob.data.batch import BadSample, read_pair_file
from cloob.errors import InputError
from cloob.machine import decoders, in_threads
from cloob.pictures import Encoded, Unreadable
from cloob.search.dates import date_of
from cloob.search.matrix import Vectors
from cloob.search.models import IndexWithModel
from cloob.search.plan import Plan, Summary, Task, make_plan
from cloob.search.query import TorchEmbedder
from cloob.search.records import FileState, IndexedModel, Item, Progress
from cloob.search.sources import Collection, LeftOut, open_collection, source_name
from cloob.search.store import Store

if TYPE_CHECKING:
    import torch

    from cloob.models.encoder import DualEncoder

_TRANSIENT = ("no permission to read", "cannot be read")  # it need not be gone


@dataclass(frozen=True)
class UpdateOptions:
    """How an index is brought up to date."""

    # as `load_model` takes it, or loaded; None: that of the index
    model: str | Path | DualEncoder | None = None
    device: str | torch.device = "auto"
    image_column: str | None = None  # of a table; ``filepath`` where none is named
    caption_column: str | None = None  # ``title``, ``caption`` or ``text``
    batch_size: int = 64  # pictures of a forward pass, and of a transaction
    workers: int = field(default_factory=decoders)  # threads that read and decode
    # all items of a source may go if nothing of it is there any more
    remove_all: bool = False


def update(
    loaded: IndexWithModel,
    sources: Sequence[str | Path],
    options: UpdateOptions,
    progress: Progress,
) -> Summary:
    """Brings the index up to date with its sources: reads what is new or changed,
    removes what is gone.
    """
    store = loaded.store
    summary = Summary()
    collections = _open_all(store, sources, options, summary.left_out)
    plans = [
        _compare(store, collection, summary, remove_all=options.remove_all)
        for collection in collections
    ]
    tasks = [task for plan in plans for task in plan.tasks]
    start = time.monotonic()
    if tasks or store.stored_model() is not None:
        model, embedder = loaded.choose(options.model, options.device)
    if tasks:
        writer = _Writer(store, model, embedder, summary, options.batch_size)
        writer.run(tasks, options.workers, progress)
    for plan in plans:
        store.remove(plan.collection.name, [state.path for state in plan.gone])
        summary.removed += sum(state.id is not None for state in plan.gone)
    store.note_unnamed()
    summary.seconds = time.monotonic() - start
    return summary


def _compare(
    store: Store, collection: Collection, summary: Summary, *, remove_all: bool
) -> Plan:
    """What is new of a source, and what is gone."""
    states = {state.path: state for state in store.states(collection.name)}
    return make_plan(collection, states, summary, remove_all=remove_all)


def _open_all(
    store: Store,
    sources: Sequence[str | Path],
    options: UpdateOptions,
    left_out: LeftOut,
) -> list[Collection]:
    """Opens sources; one that the index knows and that is gone is an empty one."""
    indexed = store.sources()
    names = list(dict.fromkeys(map(source_name, sources or indexed)))
    _check_apart(names, indexed)
    collections: list[Collection] = []
    for name in names:
        if name in indexed and not os.path.lexists(name):
            collections.append(Collection(name, left_out))
            continue
        columns = (options.image_column, options.caption_column)
        collections.append(open_collection(name, left_out, *columns))
    return collections


def _check_apart(names: Sequence[str], indexed: Sequence[str]) -> None:
    """Refuses a new source inside another one, or around it: its pictures would be in
    the index twice.
    """
    places = {name: Path(name).resolve() for name in (*indexed, *names)}
    for name in set(names).difference(indexed):
        for other in places.keys() - {name}:
            inner, outer = sorted((places[name], places[other]), key=str)[::-1]
            if inner.is_relative_to(outer):
                raise InputError(
                    f"{name}: lies in {other} or holds it, which is a source of this"
                    " index"
                )


class _Read(NamedTuple):
    """A file that was read: an item, with pixels if its bytes have no vector; or a
    fault.
    """

    task: Task
    item: Item | None = None
    pixels: torch.Tensor | None = None
    fault: str = ""
    is_transient: bool = False  # so what is known of the file stays
    notes: Sequence[tuple[str, str]] = ()  # what is left out, and where


@dataclass
class _Writer:
    """Reads, embeds and writes pictures.

    Every batch is a transaction: the next update goes on after the last one. On a CPU
    the decoding threads rest while the model runs: one picture next to a matrix product
    slows all its threads.
    """

    store: Store
    model: IndexedModel
    embedder: Callable[[], TorchEmbedder]
    summary: Summary
    batch_size: int
    # locked while the model runs on a CPU
    _running: threading.Lock = field(default_factory=threading.Lock)

    def run(self, tasks: Sequence[Task], workers: int, progress: Progress) -> None:
        """Reads the files of the tasks in threads, and embeds and writes them batch by
        batch.
        """
        waiting: list[_Read] = []
        n_decoded = 0
        results = in_threads(self._read, tasks, workers, 2 * self.batch_size)
        for count, result in enumerate(results, 1):
            waiting.append(result)
            n_decoded += result.pixels is not None
            is_full = n_decoded >= self.batch_size
            is_long = len(waiting) >= 4 * self.batch_size
            if is_full or is_long or count == len(tasks):
                self._write(waiting)
                waiting = []
                n_decoded = 0
            if progress is not None:
                progress(count, len(tasks))

    def _read(self, task: Task) -> _Read:
        """Opens one picture, in any thread; decodes it only if its bytes have no vector
        yet.
        """
        with self._running:  # waits for it
            pass
        path = task.found.path
        try:
            data = read_pair_file(path, path, "image")
            encoded = Encoded(data)
            item, notes = _describe(task, data, encoded)
            if self.store.embedded_contents([item.content]):
                return _Read(task, item, notes=notes)
            pixels = self.embedder().encoder.preprocess(encoded.rgb())
        except (BadSample, Unreadable) as bad:
            fault = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason
            return _Read(task, fault=fault, is_transient=bad.reason in _TRANSIENT)
        if encoded.truncated:
            notes.append(("truncated JPEG, taken", path))
        return _Read(task, item, pixels, notes=notes)

    def _write(self, batch: Sequence[_Read]) -> None:
        """Embeds what is new of a batch, and writes all of it."""
        vectors = self._embed_new(batch)
        bad = {hash_ for hash_, row in vectors.items() if not np.isfinite(row).all()}
        items = []
        for result in batch:
            item = result.item
            for reason, example in result.notes:
                self.summary.left_out.add(reason, example)
            if item is None:
                self._write_fault(result)
            elif item.content in bad:
                self._write_fault(_Read(result.task, fault="embedding not finite"))
            else:
                items.append(item)
                self.summary.add_item(result.task.state, item)
        for content in bad:
            del vectors[content]
        if items:
            self.store.write(items, self.model, vectors)

    def _embed_new(self, batch: Sequence[_Read]) -> dict[str, Vectors]:
        """Vectors by content; bytes that got one meanwhile are not embedded again."""
        pixels = {
            result.item.content: result.pixels
            for result in batch
            if result.item is not None and result.pixels is not None
        }
        for content in self.store.embedded_contents(list(pixels)):
            del pixels[content]
        self.summary.embedded += len(pixels)
        if not pixels:
            return {}
        embedder = self.embedder()
        is_cpu = embedder.encoder.device.type == "cpu"
        with self._running if is_cpu else contextlib.nullcontext():
            rows = embedder.pixels(list(pixels.values()))
        return dict(zip(pixels, rows, strict=True))

    def _write_fault(self, result: _Read) -> None:
        """Notes a file that cannot be read; what is known of one that can be read later
        stays.
        """
        found, before = result.task.found, result.task.state
        self.summary.add_fault(result.fault, found.path)
        if result.is_transient and before is not None and before.id is not None:
            return
        size = found.bytes or 0
        state = FileState(found.path, size, found.mtime_ns, fault=result.fault)
        if state != before:
            self.store.write_fault(result.task.collection.name, state)


def _describe(
    task: Task, data: bytes, encoded: Encoded
) -> tuple[Item, list[tuple[str, str]]]:
    """The item of a picture: its digest, size, date, caption and columns; and what is
    left out of it.
    """
    found = task.found
    caption, columns, fault = task.collection.describe(found)
    notes = [(fault, found.caption_file)] if fault else []
    stated = columns.get("date")
    date = date_of(found.path, stated, encoded.exif)
    if date is None and stated not in (None, ""):
        notes.append(("date that cannot be read", f"{found.path} ({stated})"))
    width, height = encoded.full_size
    item = Item(
        id=0,
        source=task.collection.name,
        path=found.path,
        content=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        mtime_ns=found.mtime_ns,
        width=width,
        height=height,
        date=date,
        caption=caption,
        columns=columns,
    )
    return item, notes
