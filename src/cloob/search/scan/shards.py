"""Pictures in WebDataset tar shards, on local disks or elsewhere."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Collection as Paths
from pathlib import Path
from typing import NamedTuple

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, clean_caption, printable
from cloob.data.decode import MAX_IMAGE_BYTES
from cloob.data.shards.index import group_members
from cloob.data.shards.tar import Member, TarReader
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.errors import InputError
from cloob.search.records import Value, valid
from cloob.search.scan.collection import SEPARATOR, Found, LeftOut, is_excluded, value

_PARTS = (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS, ("json",))
_MOST_LISTED = 8
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
    reader: TarReader
    image: Member
    caption: Member | None
    about: Member | None


class Shards:
    """The pictures in tars; see ``Collection``. A sample's ``.json`` gives its columns.

    A shard that lies elsewhere and of which all samples are known is not fetched again.

    Args:
        name: What the index calls them.
        shards: The tars.
        exclude: Globs of names in a tar, or of parts of these.
    """

    def __init__(self, name: str, shards: Sequence[Shard], exclude: tuple[str, ...] = ()) -> None:
        self.name = name
        self.left_out = LeftOut()
        self.unlisted: list[str] = []
        self._shards, self._exclude = shards, exclude
        self._listed: OrderedDict[str, dict[str, Found]] = OrderedDict()
        self._lock = threading.Lock()

    def scan(self, known: Paths[str] = ()) -> Iterator[Found]:
        """All pictures, shard by shard."""
        self.left_out, self.unlisted = LeftOut(), []
        by_shard: dict[str, list[str]] = {}
        if any(shard.samples is not None for shard in self._shards):
            for path in known:
                by_shard.setdefault(path.partition(SEPARATOR)[0], []).append(path)
        for shard in self._shards:
            held = by_shard.get(shard.path, [])
            if shard.samples is not None and len(held) == shard.samples:
                yield from (Found(path, None, None) for path in held)
                continue
            yield from self._scan_shard(shard)

    def read(self, found: Found) -> bytes:
        """The bytes of a member."""
        place = self._place(found)
        if place.image.size > MAX_IMAGE_BYTES:
            raise BadSample("image too large", found.path, f"{place.image.size:,} bytes")
        try:
            return place.reader.read(0, place.image.offset, place.image.size)
        except OSError as error:
            raise BadSample("missing image", found.path, error.strerror or str(error)) from None

    def describe(self, found: Found) -> tuple[str | None, Mapping[str, Value]]:
        """The caption member, and what the JSON member says."""
        place = self._place(found)
        caption, columns = None, {}
        if place.caption is not None and place.caption.size <= MAX_CAPTION_BYTES:
            data = place.reader.read(0, place.caption.offset, place.caption.size)
            try:
                caption = clean_caption(data, found.path)
            except BadSample:
                caption = None
        if place.about is not None and place.about.size <= MAX_CAPTION_BYTES:
            columns = _columns(place.reader.read(0, place.about.offset, place.about.size))
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
                    self._listed[container] = {found.path: found for found in self._scan_shard(shard)}
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

    def _scan_shard(self, shard: Shard) -> Iterator[Found]:
        try:
            file = shard.fetch()
            mtime = file.stat().st_mtime_ns if shard.local else None
            reader = TarReader((file,))
            listing = reader.listing(0)
        except (OSError, InputError) as error:
            self.unlisted.append(shard.path)
            self.left_out.add("shard cannot be read", " ".join(str(error).split()))
            return
        if listing.cut is not None:
            self.unlisted.append(shard.path)
            self.left_out.add("truncated shard", f"{shard.path}: {listing.cut}")
        for key, (image, caption, about) in group_members(listing.members, _PARTS).items():
            if image is None:
                self.left_out.add("sample without a picture", f"{shard.path}{SEPARATOR}{printable(key)}")
            elif self._exclude and is_excluded(image.name, self._exclude):
                self.left_out.add("excluded", f"{shard.path}{SEPARATOR}{printable(image.name)}")
            else:
                place = _Place(reader, image, caption, about)
                yield Found(f"{shard.path}{SEPARATOR}{image.name}", image.size, mtime, place)


def _columns(data: bytes) -> dict[str, Value]:
    """The plain values of a JSON object; nothing where it is none."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    columns = {valid(str(name)): value(each) for name, each in raw.items()} if isinstance(raw, dict) else {}
    return {name: held for name, held in columns.items() if held is not None}
