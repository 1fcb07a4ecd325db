"""Raw samples, batches of n pairs of them (H×W pixels, L tokens), and a Skip for a
sample that cannot be used.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cloob.errors import InputError
from cloob.files import TooLarge, read_at_most
from cloob.pictures import MAX_IMAGE_BYTES, Fault, Unreadable

if TYPE_CHECKING:  # sources are opened, and refused, before torch is imported
    import torch
    from torch import Tensor

CaptionFault = Literal[
    "missing caption", "empty caption", "caption not UTF-8", "caption too long"
]
FileFault = Literal[
    "missing image",
    "no permission to read",
    "cannot be read",
    "truncated shard",
]
RowFault = Literal["not finite", "no partner", "item raised an error"]
Reason = Fault | CaptionFault | FileFault | RowFault
Part = Literal["image", "caption"]
# above this many UTF-8 bytes a caption is a file in the wrong place
MAX_CAPTION_BYTES = 64 * 1024
MOST_BYTES: dict[Part, int] = {"image": MAX_IMAGE_BYTES, "caption": MAX_CAPTION_BYTES}


def as_utf8(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@dataclass(frozen=True)
class Skip:
    """One sample that was left out; ``key`` is ``shard/member``, the image's path, or a
    truncated shard's name.
    """

    key: str
    reason: Reason
    detail: str


@dataclass(eq=False)
class BadSample(Exception):  # noqa: N818
    """A sample cannot be used; carries what becomes a ``Skip``.

    ``captions`` of a lost picture stay queries.
    """

    reason: Reason
    key: str
    detail: str = ""
    captions: tuple[str, ...] = ()

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.key}: {self.reason}{detail}"

    @property
    def skip(self) -> Skip:
        return Skip(self.key, self.reason, self.detail)


@dataclass(frozen=True)
class RawSample:
    """One pair as it is stored: ``image`` is the encoded file, ``caption`` is stripped
    and never empty.
    """

    key: str
    image: bytes
    caption: str


class Reader(Protocol):
    """Samples by number.

    ``read`` gives a ``RawSample``, or a tuple that starts with key and image bytes.
    """

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> Any:
        """The sample at ``index`` in [0, len); raises ``BadSample`` when it cannot be
        used.
        """


@dataclass(frozen=True)
class Batch:
    """The pairs of one step on one rank; with those left out it would be ``n +
    len(skipped)``.
    """

    # The sides: (n, 3, H, W) uint8 raw pixels, which the encoder normalises on its
    # device, and (n, L) int64 tokens; of a caller's Dataset whatever its collation
    # made, a tuple or a mapping.
    parts: Any
    # (n,) int64, caption_id of every caption: equal captions have equal ids
    ids: Tensor
    keys: tuple[str, ...] = ()  # what a log calls each of a source or a Dataset
    skipped: tuple[Skip, ...] = ()

    @property
    def images(self) -> Any:
        return self.parts[0]

    @property
    def tokens(self) -> Any:
        return self.parts[1]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        return self._each("to", device, non_blocking=non_blocking)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which ``to(..., non_blocking=True)``
        overlaps.
        """
        return self._each("pin_memory")

    def _each(self, method: str, *args: object, **options: object) -> Batch:
        """The batch with what a method of each of its tensors gives."""
        from cloob.functional.private import tree_map

        def called(leaf: object) -> object:
            bound = getattr(leaf, method, None)
            return leaf if bound is None else bound(*args, **options)

        parts, ids = tree_map(called, (self.parts, self.ids))
        return replace(self, parts=parts, ids=ids)


def tensors_of(*values: object) -> list[Tensor]:
    """The tensors among the leaves."""
    from cloob.functional.private import tree_flatten

    return [leaf for leaf in tree_flatten(values)[0] if hasattr(leaf, "record_stream")]


def micro_batches(parts: Any, size: int) -> list[Any]:
    """A batch in micro-batches of so many items at most (0: of all), InputError for a
    kind that cannot be cut.

    They are as even as can be: where samples are left out, none is alone in a
    micro-batch, which has no spread to norm by.
    """
    from cloob.functional.private import tree_unflatten

    leaves, spec = leaves_of(parts)
    n = len(leaves[0])
    bounds = even_bounds(n, -(-n // (size or n)))
    try:
        return [
            tree_unflatten([leaf[start:stop] for leaf in leaves], spec)
            for start, stop in pairwise(bounds)
        ]
    except TypeError as error:
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves}))
        raise InputError(
            f"micro_batch_size: a batch of {kinds} cannot be cut; leave it out"
        ) from error


def even_bounds(n: int, parts: int) -> list[int]:
    """Where n items are cut into consecutive parts that differ by one at most, with
    both ends.
    """
    size, n_longer = divmod(n, parts)
    return [part * size + min(part, n_longer) for part in range(parts + 1)]


def leaves_of(parts: Any) -> tuple[list[Any], Any]:
    """Tensors, lists of texts and other leaves of a batch, and their places in lists
    and mappings.
    """
    from cloob.functional.private import tree_flatten

    def is_texts(part: object) -> bool:
        return isinstance(part, list | tuple) and isinstance((part or [None])[0], str)

    return tree_flatten(parts, is_leaf=is_texts)


def caption_id(caption: str) -> int:
    """A stable id of a caption in [0, 2**63), the same for captions that differ in case
    and white space only.
    """
    # torch, which sources are refused without
    from cloob.functional.ids import id_digest

    return id_digest(" ".join(caption.casefold().split()))


def clean_caption(raw: bytes | None, key: str, where: str = "") -> str:
    """Stored bytes as a caption; the detail of a failure starts with ``where``, e.g.
    the row of a table.
    """
    if raw is None:
        raise BadSample("missing caption", key, where)
    start = f"{where}: " if where else ""
    if len(raw) > MAX_CAPTION_BYTES:
        detail = f"{start}{len(raw):,} bytes, the limit is {MAX_CAPTION_BYTES:,}"
        raise BadSample("caption too long", key, detail)
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        caption = raw.decode("utf-16" if is_utf16 else "utf-8-sig").strip()
    except UnicodeDecodeError as error:
        detail = f"{start}byte {error.start} of {len(raw)}"
        raise BadSample("caption not UTF-8", key, detail) from None
    if not caption:
        raise BadSample("empty caption", key, where)
    return caption


def read_pair_file(path: Path | str, key: str, part: Part, where: str = "") -> bytes:
    """The file of an image or a caption; a ``BadSample`` where it cannot be read, or is
    too large.
    """
    with reading_part(part, key, f"{where}: {path}" if where else str(path)):
        return read_at_most(path, MOST_BYTES[part])


@contextmanager
def reading_part(part: Part, key: str, where: str) -> Iterator[None]:
    """Inside, an image or a caption that cannot be read, or is too large, is a bad
    sample.
    """
    is_image = part == "image"
    try:
        yield
    except TooLarge as error:
        reason: Reason = "image too large" if is_image else "caption too long"
        raise BadSample(reason, key, f"{where}: {error}") from None
    except (OSError, ValueError) as error:
        reason = read_fault(error, "missing image" if is_image else "missing caption")
        why = getattr(error, "strerror", None) or error
        raise BadSample(reason, key, f"{where}: {why}") from None


def read_fault(error: OSError | ValueError, missing: Reason) -> Reason:
    """The reason why a file was not read: it may be missing."""
    if isinstance(error, PermissionError):
        return "no permission to read"
    if isinstance(error, ValueError | FileNotFoundError):
        return missing
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        return missing
    return "cannot be read"


@contextmanager
def decoding(key: str) -> Iterator[None]:
    """Inside, a picture that cannot be decoded is a bad sample."""
    try:
        yield
    except Unreadable as error:
        raise BadSample(error.reason, key, error.detail) from None
