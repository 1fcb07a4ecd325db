"""Pictures in WebDataset tar shards, on local disks or elsewhere."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Collection as Paths
from pathlib import Path
from typing import NamedTuple

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, clean_caption, printable
from cloob.data.shards.index import group_members
from cloob.data.shards.tar import Member, TarReader
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.errors import InputError
from cloob.pictures import MAX_IMAGE_BYTES
from cloob.search.records import Value, valid
from cloob.search.scan.collection import SEPARATOR, Found, LeftOut, is_excluded, read_fault, value

_PARTS = (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS, ("json",))
_MOST_LISTED = 8
_MOST_OPEN = 4
_FAILED_SECONDS = 60.0
_CAPTION_KEYS = ("caption", "text", "title")


class Shard(NamedTuple):
    """A tar.

    Attributes:
        path: What items call it: the file, or its name where it lies elsewhere.
        fetch: Gives the file on this machine.
        local: Whether it lies there for good: then its time says whether it changed.
        samples: In it, where that is known before it is fetched.
    """

    path: str
    fetch: Callable[[], Path]
    local: bool
    samples: int | None = None


class _Place(NamedTuple):
    shard: Shard
    image: Member
    caption: Member | None
    about: Member | None


class Shards:
    """The pictures in tars; see ``Collection``. A sample's ``.json`` gives its columns.

    A shard that lies elsewhere and of which all samples are known is not fetched again.

    Args:
        name: What the index calls them.
        shards: The tars.
        exclude: Globs of tars' names, or of names in a tar or parts of these.
    """

    def __init__(self, name: str, shards: Sequence[Shard], exclude: tuple[str, ...] = ()) -> None:
        self.name = name
        self.left_out = LeftOut()
        self.unlisted: list[str] = []
        self._shards, self._exclude = shards, exclude
        self._listed: OrderedDict[str, dict[str, Found]] = OrderedDict()
        self._readers: OrderedDict[str, TarReader] = OrderedDict()
        self._failed: dict[str, tuple[float, str]] = {}  # when, and why
        self._lock = threading.RLock()

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures, shard by shard."""
        self.left_out, self.unlisted = LeftOut(), []
        by_shard: dict[str, list[str]] = {}
        if any(shard.samples is not None for shard in self._shards):
            for path in known:
                by_shard.setdefault(path.partition(SEPARATOR)[0], []).append(path)
        for shard in self._shards:
            if is_excluded(os.path.basename(shard.path), self._exclude):  # noqa: PTH119
                self.left_out.add("excluded", shard.path)
                continue
            held = by_shard.get(shard.path, [])
            if shard.samples is not None and len(held) == shard.samples:
                yield from (Found(path, None, None) for path in held)
                continue
            try:
                listed = self._list(shard)
            except (OSError, InputError) as error:
                self.unlisted.append(shard.path)
                self.left_out.add("shard cannot be read", " ".join(str(error).split()))
            else:
                yield from listed.values()

    def read(self, found: Found) -> bytes:
        """The bytes of a member."""
        place = self._place(found)
        if place.image.size > MAX_IMAGE_BYTES:
            raise BadSample("image too large", found.path, f"{place.image.size:,} bytes")
        return self._bytes(place, place.image)

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption member, and what the JSON member says."""
        place = self._place(found)
        caption, columns = None, {}
        if place.caption is not None and place.caption.size <= MAX_CAPTION_BYTES:
            data = self._bytes(place, place.caption)
            try:
                caption = clean_caption(data, found.path)
            except BadSample:
                caption = None
        if place.about is not None and place.about.size <= MAX_CAPTION_BYTES:
            columns = _columns(self._bytes(place, place.about))
        if caption is None:
            stated = next((columns[key] for key in _CAPTION_KEYS if isinstance(columns.get(key), str)), None)
            caption = str(stated) if stated else None
        return caption, columns

    def find(self, path: str) -> Found | None:
        """A picture by its path."""
        container = path.partition(SEPARATOR)[0]
        with self._lock:
            for shard in self._shards:
                if shard.path == container and container not in self._listed:
                    while len(self._listed) >= _MOST_LISTED:
                        self._listed.popitem(last=False)
                    try:
                        self._listed[container] = self._list(shard)
                    except (OSError, InputError) as error:
                        raise read_fault(path, error) from None
            return self._listed.get(container, {}).get(path)

    def _place(self, found: Found) -> _Place:
        """Where a member lies; of one that was taken for known, by looking."""
        if isinstance(found.place, _Place):
            return found.place
        again = self.find(found.path)
        if again is None:
            raise BadSample("missing image", found.path, "not in the shard any more")
        place: _Place = again.place
        return place

    def _fetch(self, shard: Shard) -> Path:
        """A shard's file; what failed is not waited for again, picture by picture, until a while has passed."""
        failed = self._failed.get(shard.path)
        if failed is not None and time.monotonic() - failed[0] < _FAILED_SECONDS:
            raise InputError(failed[1])
        try:
            return shard.fetch()
        except (OSError, InputError) as error:
            self._failed[shard.path] = time.monotonic(), str(error)
            raise

    def _bytes(self, place: _Place, member: Member) -> bytes:
        try:
            return self._reader(place.shard).read(0, member.offset, member.size)
        except (OSError, InputError) as error:
            raise read_fault(f"{place.shard.path}{SEPARATOR}{member.name}", error) from None

    def _reader(self, shard: Shard) -> TarReader:
        """Reads a shard; opened or unpacked once, whatever the number of threads."""
        with self._lock:
            if shard.path not in self._readers:
                reader = TarReader((self._fetch(shard),))
                reader.read(0, 0, 0)
                self._keep(shard, reader)
            self._readers.move_to_end(shard.path)
            return self._readers[shard.path]

    def _keep(self, shard: Shard, reader: TarReader) -> None:
        """Keeps a reader in the place of older ones; these end when the last thread has read."""
        with self._lock:
            held = self._readers
            held[shard.path] = reader
            held.move_to_end(shard.path)
            if len(held) > _MOST_OPEN:
                held.popitem(last=False)

    def _list(self, shard: Shard) -> dict[str, Found]:
        """The pictures of a shard by their paths.

        Raises:
            OSError, InputError: It cannot be read.
        """
        file = self._fetch(shard)
        mtime = file.stat().st_mtime_ns if shard.local else None
        reader = TarReader((file,))
        listing = reader.listing(0)
        self._keep(shard, reader)
        found: dict[str, Found] = {}
        if listing.cut is not None:
            self.unlisted.append(shard.path)
            self.left_out.add("truncated shard", f"{shard.path}: {listing.cut}")
        for key, (image, caption, about) in group_members(listing.members, _PARTS).items():
            if image is None:
                self.left_out.add("sample without a picture", f"{shard.path}{SEPARATOR}{printable(key)}")
            elif self._exclude and is_excluded(image.name, self._exclude):
                self.left_out.add("excluded", f"{shard.path}{SEPARATOR}{printable(image.name)}")
            else:
                path = f"{shard.path}{SEPARATOR}{image.name}"
                found[path] = Found(path, image.size, mtime, _Place(shard, image, caption, about))
        return found


def _columns(data: bytes) -> dict[str, Value]:
    """The plain values of a JSON object; nothing where it is none."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    columns = {valid(str(name)): value(each) for name, each in raw.items()} if isinstance(raw, dict) else {}
    return {name: held for name, held in columns.items() if held is not None}
