"""Brings an index in line with a source: plans by size and time, then embeds, copies or
removes vectors.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import BadSample
from cloob.data.sources.arrow import NO_PICTURE
from cloob.machine import in_threads
from cloob.models.encoder import DualEncoder, evaluating
from cloob.pictures import Encoded, Unreadable
from cloob.search.dates import date_of, iso_date
from cloob.search.records import (
    SEPARATOR,
    FileState,
    IndexedModel,
    Item,
    Progress,
    valid,
)
from cloob.search.scan.collection import (
    Collection,
    FoundPicture,
    LeftOut,
    ReadFailed,
)
from cloob.search.store import Store, Vectors

_FINAL = re.compile(
    f"^(corrupt image|embedding not finite)|{NO_PICTURE}"
)  # not worth another try
_NEW = FileState(
    None, "", -1, None, "", "", ()
)  # of a file that the index does not know
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
    unreadable: LeftOut = field(
        default_factory=LeftOut
    )  # files by the reason why; old ones included
    left_out: LeftOut = field(default_factory=LeftOut)
    refused: dict[str, str] = field(
        default_factory=dict
    )  # by source, why nothing of it was done or removed
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
        self.unreadable.add(
            fault if fault.startswith("no decoder") else re.split(r" \(|:", fault)[0],
            path,
        )


@dataclass(eq=False, slots=True)
class Work:
    """A file, and what was made of it."""

    found: FoundPicture
    state: FileState  # what the index knows of the file, or ``_NEW``
    collection: Collection
    item: Item | None = None  # None where the file cannot be read
    pixels: Tensor | None = None
    row: Vectors | None = (
        # (D,), in the place of pixels: the vector that the index has of these bytes
        None
    )
    fault: str = ""  # why it cannot be read
    transient: bool = (
        False  # the fault may be temporary, so what is known of the file stays
    )


def make_plan(
    store: Store,
    collection: Collection,
    model: int,
    summary: Summary,
    *,
    remove_all: bool = False,
) -> tuple[list[Work], list[FileState]]:
    """Compares a source with what the index knows of it, and opens no file: what is to
    do, and what is gone.
    """
    known = {state.path: state for state in store.states(collection.name)}
    were = {
        SEPARATOR in state.path for state in known.values() if state.id is not None
    }  # whether in containers
    pictures = sum(state.id is not None for state in known.values())
    collection.left_out = summary.left_out
    work: list[Work] = []
    seen: set[str] = set()
    now: set[bool] = set()  # of the pictures that are there, whether in containers
    for result in collection.scan(known.keys()):
        path, missing = result.path, result.bytes == 0 and result.mtime_ns is None
        if not missing:
            now.add(SEPARATOR in path)
        if path in seen:
            continue
        seen.add(path)
        if valid(path) != path:
            summary.left_out.add("name that is not UTF-8, to be renamed", path)
            continue
        state = known.pop(path, _NEW)
        same = result.bytes in (None, state.bytes) and result.content in (
            "",
            state.content,
        )
        same = same and result.mtime_ns == state.mtime_ns
        if same and state.fault is None and model in state.models:
            summary.unchanged += 1
        elif same and state.fault and (missing or _FINAL.search(state.fault)):
            summary.add_fault(state.fault, path)
        else:
            work.append(Work(result, state, collection))
    unlisted = tuple(
        f"{folder}{end}" for folder in collection.unlisted for end in ("/", SEPARATOR)
    )
    gone = [state for path, state in known.items() if not path.startswith(unlisted)]
    if (
        pictures and not were & now and not remove_all and not (unlisted and not now)
    ):  # unmounted, or of another kind
        kinds = {False: "files", True: "in tars or Arrow files"}
        change = (
            f"its {pictures:,} pictures were {kinds[True in were]} and now are"
            f" {kinds[True in now]}"
        )
        why = (
            change
            if now
            else f"none of its {pictures:,} pictures is there any more (not mounted?)"
        )
        advice = "--remove-all removes them"
        summary.refused[collection.name] = f"{why}, so nothing was removed; {advice}"
        return [], []
    if not seen and not pictures and not unlisted:
        summary.refused[collection.name] = "no pictures in it"
    return work, gone


@dataclass
class Builder:
    """Reads, embeds and writes pictures.

    Every batch is a transaction: the next update goes on after the last one.

    On a CPU the decoding threads rest while the model runs: one picture next to a
        matrix product slows all its threads.
    """

    _store: Store
    _model: IndexedModel
    _encoder: Callable[[], DualEncoder]
    _summary: Summary
    _batch_size: int
    _max_pixels: int | None
    _running: threading.Lock = field(
        default_factory=threading.Lock
    )  # locked while the model runs on a CPU

    def run(self, work: Sequence[Work], workers: int, progress: Progress) -> None:
        waiting, decoded = list[Work](), 0
        for count, prepared in enumerate(
            in_threads(self._prepare, work, workers, 2 * self._batch_size), 1
        ):
            waiting.append(prepared)
            decoded += prepared.pixels is not None
            if (
                decoded >= self._batch_size
                or len(waiting) >= 4 * self._batch_size
                or count == len(work)
            ):
                self._write(waiting)
                waiting, decoded = [], 0
            if progress is not None:
                progress(count, len(work))

    def _prepare(self, work: Work) -> Work:
        """Opens one picture, in any thread; decodes it only if the vector of its bytes
        is not known.
        """
        with self._running:  # waits for it
            pass
        path, _, time, *_ = work.found
        try:
            data = work.collection.read(work.found)
            encoded, content = (
                Encoded(data, self._max_pixels),
                hashlib.sha256(data).hexdigest(),
            )
            caption, stated = work.collection.describe(work.found)
            columns = dict(stated)
            taken, origin = date_of(path, stated.get("date"), encoded.exif)
            if origin:
                columns.setdefault("date_from", origin)
            item = Item(
                0,
                work.collection.name,
                path,
                content,
                len(data),
                time,
                *encoded.full_size,
                taken,
                caption,
                columns,
            )
            work.row = self._store.known(self._model, [content]).get(content)
            if work.row is None:
                work.pixels = self._encoder().preprocess(encoded.rgb())
            work.item = item
            if encoded.truncated:
                self._summary.left_out.add("truncated JPEG, taken", path)
            if (
                stated.get("date") not in (None, "")
                and iso_date(stated["date"]) is None
            ):
                self._summary.left_out.add(
                    "date that cannot be read", f"{path} ({stated['date']})"
                )
        except (BadSample, Unreadable) as bad:
            work.fault = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason
            work.transient = isinstance(bad, ReadFailed)
        return work

    def _write(self, batch: Sequence[Work]) -> None:
        """Writes a batch; bytes whose vector came to be known meanwhile are not
        embedded again.
        """
        items = {work: work.item for work in batch if work.item is not None}
        pixels = {
            item.content: work.pixels
            for work, item in items.items()
            if work.pixels is not None
        }
        rows = {
            item.content: work.row
            for work, item in items.items()
            if work.row is not None
        }
        rows |= self._store.known(self._model, pixels.keys() - rows.keys())
        new = [content for content in pixels if content not in rows]
        for start in range(0, len(new), self._batch_size):
            contents = new[start : start + self._batch_size]
            stack, encoder = (
                torch.stack([pixels[content] for content in contents]),
                self._encoder(),
            )
            device, in_bf16 = (
                torch.device(getattr(encoder, "device", "cpu")),
                self._model.precision == "bf16",
            )
            alone = self._running if device.type == "cpu" else contextlib.nullcontext()
            with (
                alone,
                evaluating(encoder),
                torch.autocast(device.type, torch.bfloat16, enabled=in_bf16),
            ):
                features = encoder.encode_image(stack.to(device))
            embedded = features.float().cpu().numpy()
            rows |= zip(contents, embedded, strict=True)
        self._summary.embedded += len(new)
        good = {
            work: item
            for work, item in items.items()
            if np.isfinite(rows[item.content]).all()
        }
        # what is new of a file: this path, its bytes, its description, or its vector
        changes: dict[Work, str] = {}
        for work, item in good.items():
            changed, known = (
                work.state.content != item.content,
                self._model.number in work.state.models,
            )
            of_known = "changed" if changed else "described" if known else "completed"
            changes[work] = "added" if work.state.id is None else of_known
        arrived = [
            item for work, item in good.items() if changes[work] in ("added", "changed")
        ]
        others = [
            model
            for model in self._store.models()
            if model.number != self._model.number
        ]
        copies = {
            model: self._store.known(model, {item.content for item in arrived})
            for model in others
        }
        for model, vectors in (
            *copies.items(),
            (self._model, rows),
        ):  # this one last: what has its vector is done
            some = [
                item
                for item in (good.values() if vectors is rows else arrived)
                if item.content in vectors
            ]
            if some:
                self._store.write(
                    some, model, np.stack([vectors[item.content] for item in some])
                )
        for work in batch:
            if work in good:
                setattr(
                    self._summary,
                    changes[work],
                    getattr(self._summary, changes[work]) + 1,
                )
            else:
                found, fault = work.found, work.fault or "embedding not finite"
                state = FileState(
                    None, found.path, found.bytes or 0, found.mtime_ns, "", fault, ()
                )
                if state != work.state and (
                    work.state.id is None or not work.transient
                ):
                    self._store.write_faults(work.collection.name, [state])
                self._summary.add_fault(fault, found.path)
            work.item = work.pixels = work.row = (
                None  # which are not kept until the end
            )
