"""What a source of pairs is, and by which endings of their names files are pictures or captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the endings alone need no pyarrow
    from cloob.data.batch import RawSample
    from cloob.data.fingerprint import Fingerprint

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
CAPTION_EXTENSIONS = ("txt", "caption")
IMAGE_SUFFIXES = tuple(f".{ext}" for ext in IMAGE_EXTENSIONS)
CAPTION_SUFFIXES = tuple(f".{ext}" for ext in CAPTION_EXTENSIONS)


class Source(Protocol):
    """Pairs by number. Picklable, cheap to copy into a worker, and safe to read from several processes.

    ``shard_sizes`` are the numbers of consecutive rows that lie in one file; they add up to ``len``. A source may also
    have ``prefetch(indices)``: the loader calls it with the numbers of pairs that will be read soon.
    """

    @property
    def name(self) -> str: ...

    @property
    def shard_sizes(self) -> tuple[int, ...]: ...

    @property
    def streamed(self) -> bool:
        """Whether reading in random order is costly: the loader then reads file by file."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> Fingerprint:
        """What the source holds, in a few named digests and counts: equal for equal data, wherever they lie."""

    def read(self, index: int) -> RawSample:
        """The pair at ``index`` in [0, len); raises ``BadSample`` when it cannot be used."""
