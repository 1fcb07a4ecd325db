"""Brings an index in line with a source: plans what is to do, then embeds, copies and removes vectors.

A file is unchanged if its size and time are. Of the others, files whose bytes are known copy their vectors.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date

import numpy as np
import torch
from torch import Tensor

from cloob.data.batch import BadSample
from cloob.data.sources.arrow import NO_PICTURE
from cloob.models.encoding import Encoder, evaluating
from cloob.pictures import MAX_JPEG_PIXELS, MAX_PIXELS, Encoded, Unreadable
from cloob.search.identity import Making
from cloob.search.records import Item, Value, valid
from cloob.search.scan.collection import EXAMPLES, SEPARATOR, Collection, Found, LeftOut, ReadFailed
from cloob.search.store import FileState, Store, Vectors

_UNREAD = ("folder cannot be listed", "shard cannot be read", "truncated shard")
_COUNTS = ("added", "changed", "described", "completed", "removed", "unchanged", "embedded")
_SPARE = 2  # sides of a picture that is decoded smaller, at least, in sides of the model's input
_REMOVED_AT_ONCE = 10_000
_EXIF_DATES = ((0x8769, 0x9003), (0x8769, 0x9004), (None, 0x0132))  # taken, digitised, changed
_DATE = re.compile(r"(\d{4})(?:-(\d\d)|[-/.:](\d\d?)[-/.:](\d\d?)(?:[T ](\d\d:\d\d(?::\d\d)?\S*))?)?")


@dataclass
class Summary:
    """What an update did."""

    added: int = 0  # new pictures, renamed ones included
    changed: int = 0  # pictures whose file holds something else now
    described: int = 0  # files of the same bytes with another time, caption or columns
    completed: int = 0  # known pictures that got a vector of this model
    removed: int = 0
    unchanged: int = 0  # files that were not opened
    embedded: int = 0  # pictures that went through the model
    faults: Counter[str] = field(default_factory=Counter)  # files that cannot be read, by reason; old ones included
    fault_examples: dict[str, list[str]] = field(default_factory=dict)  # the first few paths of each reason
    left_out: LeftOut = field(default_factory=LeftOut)
    refused: dict[str, str] = field(default_factory=dict)  # by source, why nothing of it was done or removed
    seconds: float = 0.0

    @property
    def unread(self) -> int:
        """Folders and shards that could not be read completely."""
        return sum(self.left_out.counts.get(reason, 0) for reason in _UNREAD)

    def add_fault(self, fault: str, path: str) -> None:
        """Counts a file that cannot be read, without the details; those of a decoder say what to install."""
        reason = fault if fault.startswith("no decoder") else fault.partition(" (")[0].partition(":")[0]
        self.faults[reason] += 1
        examples = self.fault_examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(path)

    def add(self, other: Summary) -> None:
        """Adds what another source or rank did."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults.update(other.faults)
        for reason, examples in other.fault_examples.items():
            shown = self.fault_examples.setdefault(reason, [])
            shown += examples[: EXAMPLES - len(shown)]
        for reason, count in other.left_out.counts.items():
            first, *rest = other.left_out.examples[reason]
            self.left_out.add(reason, first, count)
            for example in rest:
                self.left_out.add(reason, example, 0)
        self.refused.update(other.refused)


@dataclass(frozen=True)
class Work:
    """A picture that has to be opened."""

    found: Found
    state: FileState | None  # what the index knows of the file
    collection: Collection


@dataclass
class Plan:
    """What one source needs, and what is known without opening a file."""

    collection: Collection
    work: list[Work]
    gone: list[FileState]  # known files that the source does not have any more
    summary: Summary


def make_plan(
    store: Store, collection: Collection, model: str, max_megapixels: float | None = None, *, remove_all: bool = False
) -> Plan:
    """Compares a source with what the index knows of it; opens no file."""
    known = {state.path: state for state in store.states(collection.name)}
    pictures = [state for state in known.values() if state.id is not None]
    plan = Plan(collection, [], [], Summary())
    seen: set[str] = set()
    in_containers: set[bool] = set()  # of the pictures that are there
    for found in collection.scan(known.keys()):
        if not found.missing:
            in_containers.add(SEPARATOR in found.path)
        if found.path in seen:
            continue
        seen.add(found.path)
        if valid(found.path) != found.path:
            collection.left_out.add("name that is not UTF-8, to be renamed", found.path)
            continue
        state = known.pop(found.path, None)
        if state is None or state.mtime_ns != found.mtime_ns or found.bytes not in (None, state.bytes):
            plan.work.append(Work(found, state, collection))
        elif state.fault is not None and (found.missing or not _worth_another_try(state.fault, max_megapixels)):
            plan.summary.add_fault(state.fault, state.path)
        elif state.fault is None and model in state.models:
            plan.summary.unchanged += 1
        else:
            plan.work.append(Work(found, state, collection))
    plan.gone = [state for path, state in known.items() if not _below(path, collection.unlisted)]
    plan.summary.left_out = collection.left_out
    if not seen and not pictures and not collection.unlisted:
        plan.summary.refused[collection.name] = "no pictures in it"
    elif pictures and not remove_all:
        _refuse_losses(plan, pictures, in_containers)
    return plan


def _refuse_losses(plan: Plan, pictures: Sequence[FileState], in_containers: set[bool]) -> None:
    """Keeps the pictures of a source that looks unmounted, or was replaced by one of another kind."""
    were, name = {SEPARATOR in state.path for state in pictures}, plan.collection.name
    if in_containers and not were & in_containers:
        plan.gone, plan.work = [], []
        before, now = ("in tars or Arrow files", "files") if True in were else ("files", "in tars or Arrow files")
        plan.summary.refused[name] = (
            f"its {len(pictures):,} pictures were {before} and now are {now}, so nothing was done; "
            "--remove-all takes these for those"
        )
    elif not in_containers and not plan.collection.unlisted:
        plan.gone = []
        plan.work = [work for work in plan.work if work.state is None or work.state.id is None]
        plan.summary.refused[name] = (
            f"none of its {len(pictures):,} pictures is there any more (not mounted?), so nothing was removed; "
            "--remove-all removes them"
        )


def pixel_limit(max_megapixels: float | None) -> int | None:
    """The limit in pixels."""
    return None if max_megapixels is None else max(1, int(max_megapixels * 1e6))


def _worth_another_try(fault: str, max_megapixels: float | None) -> bool:
    """Whether a file that could not be read may be readable by now though it has not changed."""
    if fault.startswith(("no decoder", "missing image", "no permission")):
        return NO_PICTURE not in fault
    if " pixels, the limit is " not in fault:
        return False
    limit = pixel_limit(max_megapixels)  # another limit is worth another try
    return not any(
        fault.endswith(f"{each:,})") for each in ([MAX_PIXELS, MAX_JPEG_PIXELS] if limit is None else [limit])
    )


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(path.startswith((f"{folder}/", f"{folder}{SEPARATOR}")) for folder in folders)


@dataclass(frozen=True)
class Prepared:
    """A picture that was opened."""

    work: Work
    item: Item | None  # None if the file cannot be read
    pixels: Tensor | None = None  # None if the vector is known
    fault: str = ""  # why it cannot be read
    transient: bool = False  # the fault may be temporary, so what is known of the file stays
    truncated: bool = False  # a JPEG that lacks its end

    @property
    def content(self) -> str:
        """The hash of the file; empty if it cannot be read."""
        return "" if self.item is None else self.item.content

    @property
    def is_new(self) -> bool:
        """Whether the index does not have these bytes at this path."""
        state = self.work.state
        return state is None or state.id is None or state.content != self.content


class Builder:
    """Reads, embeds and writes pictures. Each batch is a transaction: the next update goes on after the last one.

    On a CPU the decoding threads rest while the model runs: both have a thread for each processor, and those of a
    matrix product wait for each other, so that one picture beside it holds up all of them.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        encoder: Callable[[], Encoder],
        making: Making,
        batch_size: int,
        max_megapixels: float | None,
    ) -> None:
        self.summary = Summary()
        self._store, self._model, self._encoder, self._making = store, model, encoder, making
        self._batch_size, self._max_pixels = batch_size, pixel_limit(max_megapixels)
        self._waiting: list[Prepared] = []
        self._may_decode = threading.Event()
        self._may_decode.set()

    def prepare(self, work: Work, *, decode: bool = False) -> Prepared:
        """Opens one picture, in any thread; decodes it only if its vector is not known, unless ``decode``."""
        self._may_decode.wait()
        try:
            data = work.collection.read(work.found)
            encoded = Encoded(data, self._max_pixels)
            item = _item(work, encoded, data)
            if not decode and self._is_known(item.content):
                return Prepared(work, item)
            side = getattr(self._encoder(), "image_size", None) if self._making.draft else None
            pixels = self._encoder().preprocess(encoded.rgb(_draft_reduction(encoded.stored, side)))
            return Prepared(work, item, pixels, truncated=encoded.truncated)
        except BadSample as bad:
            fault = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason
            return Prepared(work, None, fault=fault, transient=isinstance(bad, ReadFailed))
        except Unreadable as bad:
            return Prepared(work, None, fault=f"{bad.reason} ({bad.detail})")

    def add(self, prepared: Prepared) -> None:
        """Keeps a picture for the next batch."""
        path = prepared.work.found.path
        stated = None if prepared.item is None else prepared.item.columns.get("date")
        if stated not in (None, "") and _iso_date(stated) is None:
            self.summary.left_out.add("date that cannot be read", f"{path} ({stated})")
        if prepared.truncated:
            self.summary.left_out.add("truncated JPEG, taken", path)
        self._waiting.append(prepared)
        decoded = sum(each.pixels is not None for each in self._waiting)
        if decoded >= self._batch_size or len(self._waiting) >= 4 * self._batch_size:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting. All known vectors are read before one is written: files may exchange their bytes."""
        waiting, self._waiting = self._waiting, []
        own = self._known_rows(self._model, waiting)
        batch = [self._decoded(each, own) for each in waiting]
        new = {each.content: each.pixels for each in batch if each.pixels is not None and each.content not in own}
        for start in range(0, len(new), self._batch_size):
            contents = list(new)[start : start + self._batch_size]
            own |= zip(contents, self._embed([new[content] for content in contents]), strict=True)
        self.summary.embedded += len(new)
        good = [each for each in batch if each.item is not None and np.isfinite(own[each.content]).all()]
        arrived = [each for each in good if each.is_new]
        others = [model.name for model in self._store.models() if model.name != self._model]
        copies = {model: self._known_rows(model, arrived) for model in others}
        for model, rows in copies.items():
            self._write(model, [each for each in arrived if each.content in rows], rows)
        self._write(self._model, good, own)  # last: a file that has this vector is done
        for each in batch:
            if each.item is not None and np.isfinite(own[each.content]).all():
                self._count(each)
            else:
                self._write_fault(each)

    def _is_known(self, content: str) -> bool:
        ids = self._store.find([content]).get(content, [])
        return bool(ids) and bool(np.isfinite(self._store.vectors(self._model, ids)).all(1).any())

    def _known_rows(self, model: str, some: Sequence[Prepared]) -> dict[str, Vectors]:
        """By content the vectors of a model that the index has."""
        holders = self._store.find(list({each.content for each in some})) if some else {}
        contents = {id_: content for content, ids in holders.items() for id_ in ids}
        rows = zip(contents.values(), self._store.vectors(model, list(contents)), strict=True)
        return {content: row for content, row in rows if np.isfinite(row).all()}

    def _decoded(self, prepared: Prepared, known: dict[str, Vectors]) -> Prepared:
        """A picture whose vector was known, and is not any more, again with its pixels."""
        if prepared.item is None or prepared.pixels is not None or prepared.content in known:
            return prepared
        return self.prepare(prepared.work, decode=True)

    def _embed(self, pixels: Sequence[Tensor]) -> Vectors:
        encoder = self._encoder()
        device = torch.device(getattr(encoder, "device", "cpu"))
        bf16 = self._making.precision == "bf16"
        if device.type == "cpu":
            self._may_decode.clear()
        try:
            with evaluating(encoder), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                rows: Vectors = encoder.encode_image(torch.stack(list(pixels)).to(device)).float().cpu().numpy()
        finally:
            self._may_decode.set()
        return rows

    def _write(self, model: str, some: Sequence[Prepared], rows: dict[str, Vectors]) -> None:
        if some:
            items = [each.item for each in some if each.item is not None]
            self._store.write(items, model, np.stack([rows[each.content] for each in some]))

    def _count(self, prepared: Prepared) -> None:
        state = prepared.work.state
        if state is None or state.id is None:
            self.summary.added += 1
        elif state.content != prepared.content:
            self.summary.changed += 1
        elif self._model not in state.models:
            self.summary.completed += 1
        else:
            self.summary.described += 1

    def _write_fault(self, prepared: Prepared) -> None:
        found, known = prepared.work.found, prepared.work.state
        fault = prepared.fault or "embedding not finite"
        state = FileState(None, found.path, found.bytes or 0, found.mtime_ns, "", fault, ())
        stays = prepared.transient and known is not None and known.id is not None
        if not stays and state != known:
            self._store.write_faults(prepared.work.collection.name, [state])
        self.summary.add_fault(fault, found.path)


def remove_gone(store: Store, plan: Plan) -> int:
    """Removes what a source does not have any more; returns how many pictures."""
    ids = [state.id for state in plan.gone if state.id is not None]
    for start in range(0, len(ids), _REMOVED_AT_ONCE):
        store.remove(ids[start : start + _REMOVED_AT_ONCE])
    if faulty := [state.path for state in plan.gone if state.id is None]:
        store.clear_faults(plan.collection.name, faulty)
    return len(ids)


def _draft_reduction(stored: tuple[int, int], side: int | None) -> int:
    """By which factor a JPEG of this size may come out smaller, so that twice the model's side is left."""
    reduction = 1
    while side and reduction < 8 and min(stored) >= 2 * reduction * _SPARE * side:
        reduction *= 2
    return reduction


def _item(work: Work, encoded: Encoded, data: bytes) -> Item:
    caption, columns = work.collection.describe(work.found)
    width, height = encoded.whole
    return Item(
        id=0,
        source=work.collection.name,
        path=work.found.path,
        content=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        mtime_ns=work.found.mtime_ns,
        width=width,
        height=height,
        date=_iso_date(columns.get("date")) or _date_taken(encoded),
        caption=caption,
        columns=dict(columns),
    )


def _iso_date(stated: Value) -> str | None:
    """ISO 8601 of a date that begins with the year: ``2024``, ``20240601``, ``2024/6/1 10:00``."""
    text = str(int(stated) if isinstance(stated, float) and stated.is_integer() else stated).strip("\0 ")
    if len(text) == 8 and text.isdecimal():
        text = f"{text[:4]}-{text[4:6]}-{text[6:]}"
    if (match := _DATE.fullmatch(text)) is None:
        return None
    year, *parts = [int(part) for part in match.groups()[:4] if part]
    try:
        date(year, *[*parts, 1, 1][:2])
    except ValueError:
        return None
    day = "-".join([f"{year:04}", *(f"{part:02}" for part in parts)])
    return f"{day}T{match[5]}" if match[5] else day


def _date_taken(encoded: Encoded) -> str | None:
    """When a picture was taken according to its EXIF, without a time zone."""
    if (exif := encoded.exif) is None:
        return None
    for group, tag in _EXIF_DATES:
        try:
            raw = exif.get(tag) if group is None else exif.get_ifd(group).get(tag)
        except Exception:  # Pillow raises nearly anything on damaged EXIF
            continue
        if isinstance(raw, str) and (taken := _iso_date(raw)) is not None:
            return taken
    return None
