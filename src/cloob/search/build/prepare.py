"""From a picture that a source names to its pixels and to what the index says of it: in threads, ahead of the model."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar
from warnings import catch_warnings

from torch import Tensor

from cloob.data.batch import BadSample
from cloob.pictures import Encoded, Unreadable
from cloob.search.build.forward import Forward
from cloob.search.records import Item, Value
from cloob.search.scan.collection import Collection, Found, ReadFailed
from cloob.search.store import FileState

_DATES = ((0x8769, 0x9003), (0x8769, 0x9004), (None, 0x0132))  # EXIF: taken, digitised, changed
_DATE = re.compile(r"(\d{4}):(\d\d):(\d\d)(?:[ T](\d\d):(\d\d):(\d\d))?")
_ISO = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d:\d\d(:\d\d)?\S*)?)?)?")
_DAY = re.compile(r"(\d{4})[-/.:](\d\d?)[-/.:](\d\d?)([T ].*)?")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Work:
    """A picture that has to be looked at.

    Attributes:
        found: Where it is.
        state: What is known of the file; None for a new one.
        collection: Its source.
    """

    found: Found
    state: FileState | None
    collection: Collection


@dataclass(frozen=True)
class Prepared:
    """A picture that was looked at.

    Attributes:
        work: As it was asked for.
        item: What the index is to say of it; id 0. None where the file cannot be read.
        pixels: For the model; None where the vector is known already.
        fault: Why it cannot be read.
        passing: Whether that may pass, so that what is known of it stays.
        truncated: Whether it is a JPEG that lacks its end.
    """

    work: Work
    item: Item | None
    pixels: Tensor | None = None
    fault: str | None = None
    passing: bool = False
    truncated: bool = False


class Preparer:
    """Reads, hashes and, where the vector of these bytes is not known, decodes.

    Args:
        forward: Makes the pixels.
        known: Ids of the items that have these bytes.
        max_megapixels: A larger picture is a fault.
    """

    def __init__(
        self,
        forward: Forward,
        known: Callable[[str], Sequence[int]],
        max_megapixels: float | None = None,
    ) -> None:
        self._forward, self._known, self._most = forward, known, max_megapixels

    def __call__(self, work: Work, *, decode: bool = False) -> Prepared:
        """Looks at one picture; ``decode`` whether its vector is known or not."""
        self._forward.wait()
        try:
            data = work.collection.read(work.found)
            encoded = Encoded(data)
            width, height = encoded.in_file  # not `whole`, for which a PNG with EXIF would be decoded
            if self._most is not None and width * height > self._most * 1e6:
                return Prepared(work, None, fault=f"image too large: {too_large(width, height, self._most)}")
            content = hashlib.sha256(data).hexdigest()
            item = self._item(work, encoded, content, len(data))
            if not decode and self._known(content):
                return Prepared(work, item)
            pixels = self._forward.pixels(encoded)
            return Prepared(work, item, pixels, truncated=encoded.truncated)
        except BadSample as bad:
            fault = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason
            return Prepared(work, None, fault=fault, passing=isinstance(bad, ReadFailed))
        except Unreadable as bad:
            return Prepared(work, None, fault=f"{bad.reason} ({bad.detail})")

    def _item(self, work: Work, encoded: Encoded, content: str, size: int) -> Item:
        caption, columns = work.collection.describe(work.found)
        date = iso_date(columns.get("date")) or date_taken(encoded)
        width, height = encoded.whole
        return Item(
            id=0,
            source=work.collection.name,
            path=work.found.path,
            content=content,
            bytes=size,
            mtime_ns=work.found.mtime_ns,
            width=width,
            height=height,
            date=date,
            caption=caption,
            columns=dict(columns),
        )


def too_large(width: int, height: int, most: float) -> str:
    """The end of a fault of that kind; a picture is tried again when the limit is another one."""
    return f"{width * height / 1e6:.1f} megapixels, {limit(most)}"


def limit(most: float) -> str:
    """How a fault names the limit."""
    return f"the limit is {most:g}"


def iso_date(stated: Value) -> str | None:
    """ISO 8601 of what a column ``date`` says, which has the year first: ``2024``, ``20240601``, ``2024/6/1 10:00``."""
    if isinstance(stated, float) and stated.is_integer():
        stated = int(stated)
    text = str(stated).strip()
    if len(text) == 8 and text.isdecimal():
        text = f"{text[:4]}-{text[4:6]}-{text[6:]}"
    if match := _DAY.fullmatch(text):
        year, month, day, rest = match.groups("")
        if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
            return None
        text = f"{year}-{int(month):02}-{int(day):02}{rest}"
    return text.replace(" ", "T") if _ISO.fullmatch(text) else None


def date_taken(encoded: Encoded) -> str | None:
    """When a picture was taken as its EXIF says, ISO 8601 without a time zone; None where that says nothing."""
    exif = encoded.exif
    if exif is None:
        return None
    for group, tag in _DATES:
        try:
            raw = exif.get(tag) if group is None else exif.get_ifd(group).get(tag)
        except Exception:  # Pillow raises nearly anything on damaged EXIF
            continue
        match = _DATE.match(raw) if isinstance(raw, str) else None
        if match is not None and match[1] != "0000":
            year, month, day, *time = match.groups()
            return f"{year}-{month}-{day}" + (f"T{time[0]}:{time[1]}:{time[2]}" if time[0] else "")
    return None


def in_threads(function: Callable[[T], R], tasks: Iterator[T], workers: int, ahead: int) -> Iterator[R]:
    """``map`` in order, with so many threads that work at most ``ahead`` tasks early; 0: without."""
    if workers < 1:
        yield from map(function, tasks)
        return
    waiting: deque[Future[R]] = deque()
    # The decoder sets warning filters, which are the process's; threads that interleave could leave theirs behind.
    with catch_warnings(), ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
