"""Brings an index in line with a source: plans by size and time, hashes what may have
changed, and embeds bytes that have no vector yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import BadSample
from cloob.data.sources.arrow import NO_PICTURE
from cloob.machine import in_threads
from cloob.models.encoder import DualEncoder, evaluating
from cloob.pictures import Encoded, Unreadable
from cloob.search.dates import date_of, iso_date
from cloob.search.matrix import Vectors
from cloob.search.records import (
    SEPARATOR,
    FileState,
    IndexedModel,
    Item,
    Progress,
    Value,
    valid,
)
from cloob.search.scan.collection import (
    Collection,
    FoundPicture,
    LeftOut,
    ReadFailed,
)
from cloob.search.store import Store

# not worth another try
_FINAL = re.compile(f"^(corrupt image|embedding not finite)|{NO_PICTURE}")
_NOT_MOUNTED = (
    "picture kept, as its folder is there and empty, or another disk (delete the"
    " folder, or --remove-all)"
)
_UNREAD = (
    "folder cannot be listed",
    "shard cannot be read",
    "truncated shard",
    _NOT_MOUNTED,
)


@dataclass
class Summary:
    added: int = 0  # new pictures, renamed ones included
    changed: int = 0  # pictures whose file holds something else now
    described: int = 0  # files of the same bytes with another time, caption or columns
    completed: int = 0  # known pictures that got a vector of this model
    removed: int = 0
    unchanged: int = 0  # files that were not opened
    embedded: int = 0  # pictures that went through the model
    # files that cannot be read by the reason why; old ones included
    unreadable: LeftOut = field(default_factory=LeftOut)
    left_out: LeftOut = field(default_factory=LeftOut)
    # by source, why nothing of it was done or removed
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def faults(self) -> Counter[str]:
        return self.unreadable.counts

    @property
    def unread(self) -> int:
        return sum(self.left_out.counts[reason] for reason in _UNREAD)

    def add_fault(self, fault: str, path: str) -> None:
        """Counts a file that cannot be read, without the details; those of a decoder
        say what to install.
        """
        if not fault.startswith("no decoder"):
            fault = re.split(r" \(|:", fault)[0]
        self.unreadable.add(fault, path)

    def add_item(self, state: FileState | None, item: Item) -> None:
        """Counts what is new of a file: its path, bytes, description or vector."""
        if state is None or state.id is None:
            self.added += 1
        elif state.content != item.content:
            self.changed += 1
        elif state.has_vector:
            self.described += 1
        else:
            self.completed += 1


@dataclass(frozen=True)
class Task:
    """A file that has to be read."""

    found: FoundPicture
    state: FileState | None  # what the index knows of it
    collection: Collection


@dataclass(frozen=True)
class Plan:
    tasks: list[Task]
    gone: list[FileState]


@dataclass(frozen=True, eq=False)
class Decoded:
    task: Task
    item: Item
    pixels: Tensor


@dataclass(frozen=True)
class Known:
    """A file whose bytes have a vector."""

    task: Task
    item: Item


@dataclass(frozen=True)
class Faulty:
    task: Task
    fault: str
    is_transient: bool = False  # so what is known of the file stays


Prepared: TypeAlias = Decoded | Known | Faulty


def make_plan(
    store: Store,
    collection: Collection,
    model: int,
    summary: Summary,
    *,
    remove_all: bool = False,
) -> Plan:
    """Compares a source with what the index knows of it, and opens no file."""
    known = {state.path: state for state in store.states(collection.name, model)}
    collection.left_out = summary.left_out
    found = dict(_scan(collection, known, summary))
    tasks = []
    for path, picture in found.items():
        if _has_changed(picture, known.get(path), summary):
            tasks.append(Task(picture, known.get(path), collection))
    gone = [state for path, state in known.items() if path not in found]
    gone = [state for state in gone if not state.path.startswith(_unlisted(collection))]
    if not remove_all:
        present = found.keys() & known.keys()
        gone = _without_mounts(gone, present, collection.name, summary.left_out)
    why = _why_refused(known, found, collection)
    if why and not (remove_all and known):
        summary.refused[collection.name] = why
        return Plan([], [])
    return Plan(tasks, gone)


def _scan(
    collection: Collection, known: dict[str, FileState], summary: Summary
) -> Iterator[tuple[str, FoundPicture]]:
    """What a source names, each path once."""
    seen = set()
    for picture in collection.scan():
        path = picture.path
        if path in seen:
            continue
        seen.add(path)
        if valid(path) == path:
            yield path, picture
        else:
            summary.left_out.add("name that is not UTF-8, to be renamed", path)


def _is_missing(picture: FoundPicture) -> bool:
    """Whether a table names a file that is not there."""
    return picture.bytes == 0 and picture.mtime_ns is None


def _has_changed(
    picture: FoundPicture, state: FileState | None, summary: Summary
) -> bool:
    """Whether a file has to be read; counts it otherwise."""
    if state is None or picture.bytes not in (None, state.bytes):
        return True
    if picture.mtime_ns != state.mtime_ns:
        return True
    if state.fault is None:
        if not state.has_vector:
            return True
        summary.unchanged += 1
        return False
    if _is_missing(picture) or _FINAL.search(state.fault):
        summary.add_fault(state.fault, state.path)
        return False
    return True


def _unlisted(collection: Collection) -> tuple[str, ...]:
    """Beginnings of paths of which nobody knows whether they are gone."""
    ends = ("/", SEPARATOR)
    return tuple(f"{place}{end}" for place in collection.unlisted for end in ends)


def _without_mounts(
    gone: Sequence[FileState],
    present: Iterable[str],
    source: str,
    left_out: LeftOut,
) -> list[FileState]:
    """What is gone, without the folders of disks that are not mounted: a folder that is
    there and empty, or another disk, and has none of its pictures any more.
    """
    folders = {os.path.dirname(state.path.split(SEPARATOR)[0]) for state in gone}  # noqa: PTH120
    places = {_existing(folder, source) for folder in folders} - {source}
    away = tuple(f"{place}/" for place in places if _may_be_a_mount(place))
    away = tuple(
        place for place in away if not any(path.startswith(place) for path in present)
    )
    for place in away:
        count = sum(state.path.startswith(place) for state in gone)
        left_out.add(_NOT_MOUNTED, place, count)
    return [state for state in gone if not state.path.startswith(away)]


def _existing(folder: str, source: str) -> str:
    """The folder, or the one above it that is there, up to the source."""
    while folder.startswith(f"{source}/") and not os.path.isdir(folder):  # noqa: PTH112
        folder = os.path.dirname(folder)  # noqa: PTH120
    return folder if folder.startswith(f"{source}/") else source


def _may_be_a_mount(folder: str) -> bool:
    """Whether a folder is empty, as where a disk was, or is a disk of its own."""
    with contextlib.suppress(OSError):
        return os.path.ismount(folder) or not os.listdir(folder)  # noqa: PTH208
    return False


def _why_refused(
    known: dict[str, FileState], found: dict[str, FoundPicture], collection: Collection
) -> str:
    """Why a source is not read: nothing of it is there, or it is of another kind."""
    pictures = [path for path, state in known.items() if state.id is not None]
    present = [path for path, picture in found.items() if not _is_missing(picture)]
    if not pictures:
        is_empty = not found and not collection.unlisted
        return "no pictures in it" if is_empty else ""
    advice = "so nothing was removed; --remove-all removes them"
    if not present and not collection.unlisted:
        count = f"none of its {len(pictures):,} pictures"
        return f"{count} is there any more (not mounted?), {advice}"
    before, now = _kinds(pictures), _kinds(present)
    if not present or before & now:
        return ""
    kinds = f"were {', '.join(before)} and now are {', '.join(now)}"
    return f"its {len(pictures):,} pictures {kinds}, {advice}"


def _kinds(paths: Iterable[str]) -> set[str]:
    """Whether pictures are files, or inside of some."""
    return {
        "in tars or Arrow files" if SEPARATOR in path else "files" for path in paths
    }


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
    max_pixels: int | None
    # locked while the model runs on a CPU
    _running: threading.Lock = field(default_factory=threading.Lock)

    def run(self, tasks: Sequence[Task], workers: int, progress: Progress) -> None:
        waiting: list[Prepared] = []
        n_decoded = 0
        ahead = 2 * self.batch_size
        results = in_threads(self._prepare, tasks, workers, ahead)
        for count, prepared in enumerate(results, 1):
            waiting.append(prepared)
            n_decoded += isinstance(prepared, Decoded)
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
            encoded = Encoded(data, self.max_pixels)
            item = self._describe(task, data, encoded)
            if self.store.having(self.model, [item.content]):
                return Known(task, item)
            pixels = self.encoder().preprocess(encoded.rgb())
        except (BadSample, Unreadable) as bad:
            fault = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason
            return Faulty(task, fault, isinstance(bad, ReadFailed))
        if encoded.truncated:
            self.summary.left_out.add("truncated JPEG, taken", item.path)
        return Decoded(task, item, pixels)

    def _describe(self, task: Task, data: bytes, encoded: Encoded) -> Item:
        found = task.found
        caption, columns = task.collection.describe(found)
        stated = columns.get("date")
        taken, origin = date_of(found.path, stated, encoded.exif)
        if not _is_a_date(stated):
            self.summary.left_out.add(
                "date that cannot be read", f"{found.path} ({stated})"
            )
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
        """Writes a batch; bytes that got a vector meanwhile are not embedded again."""
        pixels = {
            prepared.item.content: prepared.pixels
            for prepared in batch
            if isinstance(prepared, Decoded)
        }
        known = self.store.having(self.model, list(pixels))
        new = [content for content in pixels if content not in known]
        vectors: dict[str, Vectors] = {}
        for start in range(0, len(new), self.batch_size):
            contents = new[start : start + self.batch_size]
            rows = self._embed(torch.stack([pixels[content] for content in contents]))
            vectors.update(zip(contents, rows, strict=True))
        self.summary.embedded += len(new)
        finite = {
            content: row for content, row in vectors.items() if np.isfinite(row).all()
        }
        self._write_items(batch, finite, vectors.keys() - finite.keys())

    def _embed(self, pixels: Tensor) -> Vectors:
        encoder = self.encoder()
        device = torch.device(getattr(encoder, "device", "cpu"))
        is_bf16 = self.model.precision == "bf16"
        alone = self._running if device.type == "cpu" else contextlib.nullcontext()
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)
        with alone, evaluating(encoder), autocast:
            features = encoder.encode_image(pixels.to(device))
        rows: Vectors = features.float().cpu().numpy()
        return rows

    def _write_items(
        self, batch: Sequence[Prepared], vectors: dict[str, Vectors], bad: set[str]
    ) -> None:
        items = []
        for prepared in batch:
            if isinstance(prepared, Faulty):
                self._write_fault(prepared)
            elif prepared.item.content in bad:
                self._write_fault(Faulty(prepared.task, "embedding not finite"))
            else:
                items.append(prepared.item)
                state = prepared.task.state
                self.summary.add_item(state, prepared.item)
        if items:
            self.store.write(items, self.model, vectors)

    def _write_fault(self, faulty: Faulty) -> None:
        """Notes a file that cannot be read; what is known of one that can be read later
        stays.
        """
        found, before = faulty.task.found, faulty.task.state
        size = found.bytes or 0
        state = FileState(found.path, size, found.mtime_ns, fault=faulty.fault)
        is_kept = faulty.is_transient and before is not None and before.id is not None
        if state != before and not is_kept:
            self.store.write_faults(faulty.task.collection.name, [state])
        self.summary.add_fault(faulty.fault, found.path)


def _is_a_date(stated: Value) -> bool:
    return stated in (None, "") or iso_date(stated) is not None
