"""What a source consists of, as one key: equal for equal bytes, whatever its files are called or when they changed."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from cloob.data.batch import BadSample


class Reader(Protocol):
    """Samples by index. ``read`` gives a ``RawSample``, or a tuple that starts with key and image bytes."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> Any:
        """The sample, or ``BadSample``."""


def content_key(reader: Reader) -> str:
    """A hash of all that the samples of a set consist of, in order; names of folders do not count."""
    state = hashlib.blake2b(digest_size=16)
    for index in range(len(reader)):
        parts: tuple[str | bytes, ...]
        try:
            sample = reader.read(index)
            key, data, *_ = sample if isinstance(sample, tuple) else (sample.key, sample.image)
            parts = (key, data, getattr(sample, "caption", ""))
        except BadSample as bad:
            parts = ("\0".join((bad.key, bad.reason, *bad.captions)),)
        for part in parts:
            add_part(state, part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass"))
    return str(state.hexdigest())


def add_part(state: Any, part: bytes) -> None:
    """Adds a part with its length, so that no two lists of parts are the same bytes."""
    state.update(len(part).to_bytes(8, "little"))
    state.update(part)
