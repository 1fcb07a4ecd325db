"""Pictures that somebody brought to search with."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from starlette.exceptions import HTTPException

from cloob.pictures import Encoded, thumbnail

# How many are kept, and how many bytes of them; those used longest ago go first.
MAX_UPLOADS = 256
MAX_UPLOADS_BYTES = 256_000_000
_THUMBNAIL = 256  # pixels


@dataclass(frozen=True)
class Upload:
    """A picture that is kept in memory for a while."""

    id: str  # the first half of its bytes' SHA-256: who knows it had the picture
    data: bytes  # of the file
    width: int  # upright, pixels
    height: int
    thumbnail: bytes  # JPEG

    @classmethod
    def of(cls, data: bytes, max_pixels: int) -> Upload:
        """Reads a file of a stranger; raises Unreadable."""
        image = Encoded(data, max_pixels).rgb()
        id_ = hashlib.sha256(data).hexdigest()[:32]
        return cls(id_, data, *image.size, thumbnail(image, _THUMBNAIL))


class Uploads:
    """The uploads that were used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Upload] = OrderedDict()

    def add(self, upload: Upload) -> Upload:
        """Keeps an upload, or the earlier one of the same bytes; returns it."""
        stored = self._kept.setdefault(upload.id, upload)
        self._kept.move_to_end(upload.id)
        while len(self._kept) > MAX_UPLOADS or self._bytes() > MAX_UPLOADS_BYTES:
            self._kept.popitem(last=False)
        return stored

    def get(self, id_: str) -> Upload:
        """The upload with this id."""
        if id_ not in self._kept:
            raise HTTPException(
                404, "the uploaded picture is no longer kept; upload it again"
            )
        self._kept.move_to_end(id_)
        return self._kept[id_]

    def _bytes(self) -> int:
        return sum(len(upload.data) for upload in self._kept.values())
