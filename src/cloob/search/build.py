"""Brings an index in line with a source: plans by size and time, then embeds, copies or
removes vectors.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from torch import Tensor

from cloob.data.batch import BadSample
from cloob.data.source import RAW_SUFFIXES
from cloob.data.sources.arrow import NO_PICTURE, check_name
from cloob.data.vectors import as_floats, read_ids_of, read_matrix, rows_of
from cloob.errors import InputError, one_line
from cloob.machine import in_threads
from cloob.models.aligned.model import Side, embed_rows
from cloob.models.encoder import DualEncoder, evaluating
from cloob.pictures import Encoded, Unreadable, raw_reader
from cloob.search.metadata import TAKEN, date_of, iso_date, of_file
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
    caption_of,
    described,
    plain,
)
from cloob.search.store import SourceSettings, Store, Vectors
from cloob.search.where import equals

_FINAL = re.compile(
    f"^(corrupt image|embedding not finite)|{NO_PICTURE}"
)  # not worth another try
PATH_COLUMNS = (
    "path",
    "filepath",
    "file_name",
    "key",
    "id",
)  # of which the first that is there names a row
_BATCH = 4096  # vectors
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
        advice = "--moved names its new place, --remove-all removes them"
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
        (path, size, time, place, content), name = work.found, work.collection.name
        if isinstance(work.collection, Rows):
            work.item, work.pixels = (
                Item(0, name, path, content, size or 0, None, 0, 0),
                work.collection.row(place),
            )
            return work
        try:
            if path.lower().endswith(RAW_SUFFIXES):
                raw_reader()  # files of tens of megabytes are not read for nothing
            data = work.collection.read(work.found)
            encoded, content = (
                Encoded(data, self._max_pixels),
                hashlib.sha256(data).hexdigest(),
            )
            caption, stated = work.collection.describe(work.found)
            by_file, columns = of_file(encoded)
            columns |= stated
            taken, origin = date_of(
                path, stated.get("date"), encoded.exif, columns.pop(TAKEN, None)
            )
            if origin:
                columns.setdefault("date_from", origin)
            item = Item(
                0,
                name,
                path,
                content,
                len(data),
                time,
                *encoded.full_size,
                taken,
                caption or by_file,
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
                embedded = (
                    batch[0]
                    .collection.embed(encoder, stack.to(device))
                    .float()
                    .cpu()
                    .numpy()
                )
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


class Rows(Collection):
    """The rows of a file of vectors, for one head of a model of vectors; the path of a
    row is its label.
    """

    def __init__(self, side: Side, file: str, labels: str) -> None:
        """Opens files as ``cloob train vectors`` takes them for its rows and ids."""
        super().__init__(os.path.abspath(file))  # noqa: PTH100
        self._side, self._matrix = side, read_matrix(file)
        self._labels = rows_of(read_ids_of(labels, len(self._matrix), file), labels)

    def scan(self, known: object = ()) -> Iterator[FoundPicture]:
        kind = f"{self._side} {self._matrix.dtype} ".encode()
        for label, row in self._labels.items():
            data = self._matrix[row].tobytes()
            yield FoundPicture(
                label, len(data), None, row, hashlib.sha256(kind + data).hexdigest()
            )

    def row(self, number: int) -> Tensor:
        return as_floats(self._matrix[number : number + 1])[0]

    def check(self, encoder: DualEncoder) -> None:
        self.embed(encoder, self.row(0)[None])

    def embed(self, encoder: DualEncoder, batch: Tensor) -> Tensor:
        return embed_rows(encoder, self._side, batch)


class VectorFile(Collection):
    """A Parquet file, or a folder of them, with a column of vectors; it stays the
    source for updates and removals.
    """

    def __init__(
        self,
        name: str,
        column: str,
        path_column: str | None,
        caption_column: str | None,
    ) -> None:
        super().__init__(name)
        try:
            self.data = ds.dataset(name, format="parquet")
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{name}: no Parquet of vectors ({one_line(error)})"
            ) from None
        names = self.data.schema.names
        for named, what in ((column, "vectors"), (path_column, "path")):
            if named is not None:
                check_name(Path(name), names, named, what)
        self.column = column
        self._path = path_column or next(
            (item for item in PATH_COLUMNS if item in names), None
        )
        self._caption = caption_of(Path(name), names, caption_column)
        types = zip(names, self.data.schema.types, strict=True)
        others = [
            name
            for name, kind in types
            if not pa.types.is_nested(kind) and not pa.types.is_binary(kind)
        ]
        self._columns = [
            *dict.fromkeys(
                [column, *filter(None, (self._path, self._caption)), *others]
            )
        ]

    def check(self, encoder: Any) -> None:
        """Any model may have made them; their width is compared."""

    def batches(self) -> Iterator[tuple[list[Item], Vectors]]:
        """Rows and their vectors, as they are in the file."""
        start, names = 0, self._columns[1:]
        scanner = self.data.scanner(
            self._columns, batch_size=_BATCH, batch_readahead=2, fragment_readahead=1
        )
        for batch in scanner.to_batches():
            if not len(batch):
                continue
            flat = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            if flat.ndim != 1 or flat.dtype.kind not in "fiu" or len(flat) % len(batch):
                raise InputError(
                    f"{self.name}: {self.column!r} has no row of numbers of one width"
                    " for each row"
                )
            rows, vectors = [], as_floats(flat.reshape(len(batch), -1)).numpy()
            cells = (map(plain, batch.column(name)) for name in names)
            for number, (vector, *values) in enumerate(
                zip(vectors, *cells, strict=True), start
            ):
                row = dict(zip(names, values, strict=True))
                path = row.pop(self._path or "", None)
                path = f"{self.name}{SEPARATOR}{number}" if path is None else str(path)
                caption, others = described(row, self._caption)
                text = f"{path}\0{caption}\0{others}".encode("utf-8", "surrogatepass")
                content = hashlib.sha256(vector.tobytes() + text).hexdigest()
                rows.append(
                    Item(
                        0,
                        self.name,
                        path,
                        content,
                        0,
                        None,
                        0,
                        0,
                        None,
                        caption,
                        others,
                    )
                )
            yield rows, vectors
            start += len(batch)


def take(
    store: Store,
    model: IndexedModel,
    file: VectorFile,
    done: Summary,
    remove_all: bool,
    progress: Progress,
) -> None:
    """Writes what is new or changed in a file of vectors, and removes what is not in it
    any more.
    """
    of_file, seen = equals("source", file.name), set[int]()  # ids
    count, total = 0, int(file.data.count_rows())
    if store.count(of_file) and not total and not remove_all:
        done.refused[file.name] = (
            "no row is in it any more, so nothing was removed; --remove-all removes"
            " them"
        )
        return
    for rows, vectors in file.batches():
        if vectors.shape[1] != model.dim:
            wrong = (
                f"{file.column!r} has {vectors.shape[1]} numbers a row, {model.name}"
                f" {model.dim}"
            )
            raise InputError(f"{file.name}: {wrong}")
        if not count:
            store.set(file.name, SourceSettings((), file.column, model.fingerprint))
        lengths, places, now = np.linalg.norm(vectors, axis=1), list[int](), set[str]()
        known = store.contents(model, file.name, [row.path for row in rows])
        for place, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            id_, before = known.get(row.path, (0, ""))
            if row.path in now or id_ in seen:
                done.left_out.add("row of a path that stood before", row.path)
            elif not 0 < length < np.inf:
                done.add_fault("vector not finite, or 0", row.path)
            else:
                now.add(row.path)
                done.unchanged += before == row.content
                done.changed += before not in ("", row.content)
                done.added += not before
                places += [place] * (before != row.content)
        seen |= {known[path][0] for path in now if path in known}
        if places:
            seen |= {
                *store.write(
                    [rows[place] for place in places],
                    model,
                    vectors[places] / lengths[places, None],
                )
            }
        count += len(rows)
        if progress is not None:
            progress(count, total)
    gone = [id_ for id_ in store.ids(of_file).tolist() if id_ not in seen]
    for start in range(0, len(gone), _BATCH):
        store.remove(
            file.name, [item.path for item in store.items(gone[start : start + _BATCH])]
        )
    done.removed += len(gone)
