"""The files of an index's pictures, read again: whole, or as thumbnails."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable

from cloob.cache import Cache
from cloob.data.batch import BadSample
from cloob.errors import InputError
from cloob.pictures import Unreadable, read_file, thumbnail
from cloob.search.records import Item
from cloob.search.scan.collection import reading


def make_of_picture(item: Item, make: Callable[[bytes], bytes]) -> bytes:
    """What is made of the bytes of a picture; InputError where they cannot be read, or
    are others by now.
    """
    try:
        return make(_read(item))
    except (BadSample, Unreadable) as bad:
        raise InputError(f"{item.path}: {bad.reason} ({bad.detail})") from None


def kept_thumbnail(item: Item, size: int) -> bytes:
    """A JPEG within a square of ``size`` pixels; cached while the file stays."""
    cache = Cache()
    name = f"{item.content} {size}"
    if os.path.exists(item.path):  # noqa: PTH110
        cached = cache.find("thumbnails", name)
        with contextlib.suppress(OSError):  # removed meanwhile
            if cached is not None:
                return cached.read_bytes()
    made = make_of_picture(item, lambda data: thumbnail(data, size))
    with contextlib.suppress(InputError):  # a cache that cannot be written
        # now and then, of one content in 256, there is a look whether the cache has
        # room
        cache.put("thumbnails", name, made, evict=item.content.startswith("00"))
    return made


def _read(item: Item) -> bytes:
    """The bytes of an item; refused if they have changed since they were indexed."""
    with reading(item.path):
        data = read_file(item.path)
    if hashlib.sha256(data).hexdigest() != item.content:
        raise InputError(
            f"{item.path}: has changed since it was indexed; `cloob index` looks again"
        )
    return data
