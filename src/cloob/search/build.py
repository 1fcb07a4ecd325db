"""Brings an index in line with a source: plans what is to do, then embeds, copies and removes vectors.

A file is unchanged if its size and time are. Of the others, files whose bytes are known copy their vectors.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import BadSample
from cloob.data.source import RAW_SUFFIXES
from cloob.data.sources.arrow import NO_PICTURE
from cloob.models.encoder import DualEncoder, evaluating
from cloob.pictures import Encoded, Unreadable, raw_reader
from cloob.search.beside import TAKEN, of_file
from cloob.search.records import SEPARATOR, FileState, IndexedModel, Item, valid
from cloob.search.scan.collection import Collection, Found, LeftOut, ReadFailed
from cloob.search.scan.rows import Rows
from cloob.search.store import Store, Vectors
from cloob.search.taken import camera_and_place, date_of, iso_date

_FINAL = re.compile(f"^(corrupt image|embedding not finite)|{NO_PICTURE}")  # not worth another try
_UNREAD = ("folder cannot be listed", "shard cannot be read", "truncated shard")


@dataclass
class Summary:
    added: int = 0  # new pictures, renamed ones included
    changed: int = 0  # pictures whose file holds something else now
    described: int = 0  # files of the same bytes with another time, caption or columns
    completed: int = 0  # known pictures that got a vector of this model
    removed: int = 0
    unchanged: int = 0  # files that were not opened
    embedded: int = 0  # pictures that went through the model
    unreadable: LeftOut = field(default_factory=LeftOut)  # files by the reason why; old ones included
    left_out: LeftOut = field(default_factory=LeftOut)
    refused: dict[str, str] = field(default_factory=dict)  # by source, why nothing of it was done or removed
    seconds: float = 0.0

    @property
    def faults(self) -> Counter[str]:
        return self.unreadable.counts

    @property
    def unread(self) -> int:
        return sum(self.left_out.counts[reason] for reason in _UNREAD)

    def add_fault(self, fault: str, path: str) -> None:
        """Counts a file that cannot be read, without the details; those of a decoder say what to install."""
        self.unreadable.add(fault if fault.startswith("no decoder") else re.split(r" \(|:", fault)[0], path)


class Work(NamedTuple):
    found: Found
    state: FileState | None  # what the index knows of the file
    collection: Collection


class Plan(NamedTuple):
    collection: Collection
    work: list[Work]
    gone: list[FileState]  # known files that the source does not have any more


def make_plan(store: Store, collection: Collection, model: int, summary: Summary, *, remove_all: bool = False) -> Plan:
    """Compares a source with what the index knows of it; opens no file."""
    known = {state.path: state for state in store.states(collection.name)}
    pictures = [state for state in known.values() if state.id is not None]
    collection.left_out = summary.left_out
    work: list[Work] = []
    seen: set[str] = set()
    in_containers: set[bool] = set()  # of the pictures that are there
    for found in collection.scan(known.keys()):
        if not found.missing:
            in_containers.add(SEPARATOR in found.path)
        if found.path in seen:
            continue
        seen.add(found.path)
        if valid(found.path) != found.path:
            summary.left_out.add("name that is not UTF-8, to be renamed", found.path)
            continue
        state = known.pop(found.path, None)
        same = state and found.bytes in (None, state.bytes) and found.content in ("", state.content)
        if state is None or not same or state.mtime_ns != found.mtime_ns:
            work.append(Work(found, state, collection))
        elif state.fault is not None and (found.missing or _FINAL.search(state.fault)):
            summary.add_fault(state.fault, state.path)
        elif state.fault is None and model in state.models:
            summary.unchanged += 1
        else:
            work.append(Work(found, state, collection))
    unlisted = tuple(f"{folder}{end}" for folder in collection.unlisted for end in ("/", SEPARATOR))
    gone = [state for path, state in known.items() if not path.startswith(unlisted)]
    why = "" if remove_all or (unlisted and not in_containers) else _loss(pictures, in_containers)
    if why:
        summary.refused[collection.name] = f"{why}, so nothing was removed; --remove-all removes them"
        return Plan(collection, [], [])
    if not seen and not pictures and not unlisted:
        summary.refused[collection.name] = "no pictures in it"
    return Plan(collection, work, gone)


def _loss(pictures: Sequence[FileState], in_containers: set[bool]) -> str:
    """Why a source's known pictures look unmounted, or replaced by pictures of another kind."""
    were, kinds = {SEPARATOR in state.path for state in pictures}, {False: "files", True: "in tars or Arrow files"}
    if not pictures or were & in_containers:
        return ""
    if not in_containers:
        return f"none of its {len(pictures):,} pictures is there any more (not mounted?)"
    return f"its {len(pictures):,} pictures were {kinds[True in were]} and now are {kinds[True in in_containers]}"


@dataclass(frozen=True, eq=False)
class Prepared:
    work: Work
    item: Item | None  # None if the file cannot be read
    pixels: Tensor | None = None
    row: Vectors | None = None  # (D,), in the place of pixels: the vector that the index has of these bytes
    fault: str = ""  # why it cannot be read
    transient: bool = False  # the fault may be temporary, so what is known of the file stays
    truncated: bool = False  # a JPEG that lacks its end

    @property
    def content(self) -> str:
        return "" if self.item is None else self.item.content

    def change(self, model: int) -> Literal["added", "changed", "completed", "described"]:
        """What is new of it: this path, its bytes, its vector of this model, or what is said of it."""
        state = self.work.state
        if state is None or state.id is None:
            return "added"
        if state.content != self.content:
            return "changed"
        return "described" if model in state.models else "completed"


@dataclass
class Builder:
    """Reads, embeds and writes pictures. Each batch is a transaction: the next update goes on after the last one.

    On a CPU the decoding threads rest while the model runs: both have a thread for each processor, and those of a
    matrix product wait for each other, so that one picture beside it holds up all of them.
    """

    _store: Store
    _model: IndexedModel
    _encoder: Callable[[], DualEncoder]
    _summary: Summary
    _batch_size: int
    _max_pixels: int | None
    _waiting: list[Prepared] = field(default_factory=list)
    _decoded: int = 0  # of these
    _running: threading.Lock = field(default_factory=threading.Lock)  # held while the model runs on a CPU

    def prepare(self, work: Work) -> Prepared:
        """Opens one picture, in any thread; decodes it only if the vector of its bytes is not known."""
        with self._running:  # waits for it
            pass
        if isinstance(work.collection, Rows):
            path, size, _, row, content = work.found
            item = Item(0, work.collection.name, path, content, size or 0, None, 0, 0)
            return Prepared(work, item, work.collection.row(row))
        try:
            if work.found.path.lower().endswith(RAW_SUFFIXES):
                raw_reader()  # files of tens of megabytes are not read for nothing
            data = work.collection.read(work.found)
            encoded = Encoded(data, self._max_pixels)
            item = _item(work, encoded, data)
            if known := self._store.known(self._model, [item.content]):
                return Prepared(work, item, row=known[item.content])
            pixels = self._encoder().preprocess(encoded.rgb())
            return Prepared(work, item, pixels, truncated=encoded.truncated)
        except (BadSample, Unreadable) as bad:
            fault = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason
            return Prepared(work, None, fault=fault, transient=isinstance(bad, ReadFailed))

    def add(self, prepared: Prepared) -> None:
        path = prepared.work.found.path
        stated = None if prepared.item is None else prepared.item.columns.get("date")
        if stated not in (None, "") and iso_date(stated) is None:
            self._summary.left_out.add("date that cannot be read", f"{path} ({stated})")
        if prepared.truncated:
            self._summary.left_out.add("truncated JPEG, taken", path)
        self._waiting.append(prepared)
        self._decoded += prepared.pixels is not None
        if self._decoded >= self._batch_size or len(self._waiting) >= 4 * self._batch_size:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting; bytes whose vector came to be known meanwhile are not embedded again."""
        batch, self._waiting, self._decoded = self._waiting, [], 0
        pixels = {each.content: each.pixels for each in batch if each.pixels is not None}
        rows = {each.content: each.row for each in batch if each.row is not None}
        rows |= self._store.known(self._model, pixels.keys() - rows.keys())
        new = [content for content in pixels if content not in rows]
        for start in range(0, len(new), self._batch_size):
            contents = new[start : start + self._batch_size]
            stack = torch.stack([pixels[content] for content in contents])
            rows |= zip(contents, self._embed(batch[0].work.collection, stack), strict=True)
        self._summary.embedded += len(new)
        good = [each for each in batch if each.item is not None and np.isfinite(rows[each.content]).all()]
        kept = set(good)
        arrived = [each for each in good if each.change(self._model.number) in ("added", "changed")]
        others = [model for model in self._store.models() if model.name != self._model.name]
        copies = {model: self._store.known(model, {each.content for each in arrived}) for model in others}
        for model, vectors in (*copies.items(), (self._model, rows)):  # its own last: what has this vector is done
            some = [each for each in (good if vectors is rows else arrived) if each.content in vectors]
            if some:
                items = [each.item for each in some if each.item is not None]
                self._store.write(items, model, np.stack([vectors[each.content] for each in some]))
        for each in batch:
            if each not in kept:
                self._write_fault(each)
        for each in good:
            count = each.change(self._model.number)
            setattr(self._summary, count, getattr(self._summary, count) + 1)

    def _embed(self, collection: Collection, batch: Tensor) -> Vectors:
        encoder = self._encoder()
        device, in_bf16 = torch.device(getattr(encoder, "device", "cpu")), self._model.precision == "bf16"
        alone = self._running if device.type == "cpu" else contextlib.nullcontext()
        with alone, evaluating(encoder), torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            rows: Vectors = collection.embed(encoder, batch.to(device)).float().cpu().numpy()
        return rows

    def _write_fault(self, prepared: Prepared) -> None:
        found, known = prepared.work.found, prepared.work.state
        fault = prepared.fault or "embedding not finite"
        state = FileState(None, found.path, found.bytes or 0, found.mtime_ns, "", fault, ())
        stays = prepared.transient and known is not None and known.id is not None
        if not stays and state != known:
            self._store.write_faults(prepared.work.collection.name, [state])
        self._summary.add_fault(fault, found.path)


def _item(work: Work, encoded: Encoded, data: bytes) -> Item:
    caption, stated = work.collection.describe(work.found)
    exif, content = encoded.exif, hashlib.sha256(data).hexdigest()
    written = of_file(encoded)
    by_file = written.pop("caption", None)
    caption = caption or (str(by_file) if by_file else None)
    columns = written | camera_and_place(exif) | dict(stated)
    taken, origin = date_of(work.found.path, stated.get("date"), exif, columns.pop(TAKEN, None))
    place = (0, work.collection.name, work.found.path)
    columns |= {"date_from": origin} if origin and "date_from" not in columns else {}
    return Item(*place, content, len(data), work.found.mtime_ns, *encoded.whole, taken, caption, columns)
