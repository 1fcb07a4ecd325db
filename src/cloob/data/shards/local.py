"""Pairs in WebDataset tar shards: ``key.jpg`` and ``key.txt`` are one sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from cloob.cache import Cache
from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, RawSample, clean_caption
from cloob.data.fingerprint import Fingerprint, digest, of_column
from cloob.data.shards.index import ABSENT, CUT, open_index
from cloob.data.shards.paths import SIZES, read_sizes
from cloob.data.shards.tar import TarReader
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.errors import InputError
from cloob.pictures import MAX_IMAGE_BYTES


class ShardSource:
    """A random-access source over WebDataset tar shards on local disks.

    A sample without an image or a caption stays in the count and raises ``BadSample`` when it is read. A truncated
    shard gives its complete samples and one more row, which raises ``"truncated shard"``: so the loss is reported in
    each epoch. Other files of a sample (.json, …) are ignored.

    ``label`` is what keys and errors call a single tar that lies in the cache; its index is kept too.

    Attributes:
        left_out: What lies in the tars and is no part of a sample though it looks like one, one line a kind.
        cuts: By shard, what is missing in a truncated one.
        complete: Samples in each shard, without the row that stands for a loss.

    Raises:
        InputError: No shard, a file that is no tar, or a count that contradicts ``sizes.json`` beside the shards.
    """

    streamed = False

    def __init__(
        self, name: str, paths: Sequence[Path], *, cache: Cache | None = None, label: str | None = None
    ) -> None:
        if not paths:
            raise InputError(f"{name}: no tar shard found")
        self.name = name
        self._labels = (label,) if label else tuple(path.name for path in paths)
        self._reader = TarReader(tuple(paths), cache)
        self._index = open_index(self._reader, cache or Cache(), always=label is not None)
        self.shard_sizes = self._index.sizes
        self.left_out, self.cuts = self._index.left_out, self._index.cuts
        self.complete = tuple(map(self._index.complete, range(len(paths))))
        self._expected = _check_sizes(paths, self._index.cuts, self.complete)

    def __len__(self) -> int:
        return len(self._index)

    def fingerprint(self) -> Fingerprint:
        """The shards' names, and the names, places and sizes of their members; the members are not read."""
        keys = of_column(pa.chunked_array([self._index.keys]))
        return {
            "samples": len(self),
            "shards": digest(f"{label} {n}" for label, n in zip(self._labels, self.shard_sizes, strict=True)),
            "members": digest([keys, *self._index.places]),
        }

    def hold(self) -> None:
        """Opens the first shard, so that it can be read even when its name is gone."""
        self._reader.read(0, 0, 0)

    def read(self, index: int) -> RawSample:
        """The pair at ``index``, or a ``BadSample``; its key is ``shard file/key in the shard``."""
        shard = self._index.shard(index)
        path, label = self._reader.paths[shard], self._labels[shard]
        image_at, image_size, caption_at, caption_size = (int(column[index]) for column in self._index.places)
        if image_at == CUT:
            listed = f", sizes.json says {self._expected[shard]:,}" if shard in self._expected else ""
            complete = f"{self.complete[shard]:,} samples are complete"
            raise BadSample("truncated shard", label, f"{path}: {self.cuts[shard]}; {complete}{listed}")
        key = f"{label}/{self._index.keys[index].as_py()}"
        if image_at == ABSENT:
            raise BadSample("missing image", key, f"no {'/'.join(IMAGE_EXTENSIONS)} member of this name in {path}")
        if caption_at == ABSENT:
            raise BadSample("missing caption", key, f"no {'/'.join(CAPTION_EXTENSIONS)} member of this name in {path}")
        if caption_size > MAX_CAPTION_BYTES:
            raise BadSample("caption too long", key, f"{caption_size:,} bytes, the limit is {MAX_CAPTION_BYTES:,}")
        if image_size > MAX_IMAGE_BYTES:
            raise BadSample("image too large", key, f"{image_size:,} bytes")
        try:
            caption = clean_caption(self._reader.read(shard, caption_at, caption_size), key)
            return RawSample(key, self._reader.read(shard, image_at, image_size), caption)
        except OSError as error:
            raise BadSample("missing image", key, f"{path}: {error.strerror or error}") from None


def _check_sizes(paths: Sequence[Path], cuts: dict[int, str], complete: Sequence[int]) -> dict[int, int]:
    """By shard, what ``sizes.json`` beside it says; for complete shards it must be what they hold."""
    listed = {folder: read_sizes(folder / SIZES) for folder in {path.parent for path in paths}}
    expected: dict[int, int] = {}
    for i, path in enumerate(paths):
        count = listed[path.parent].get(path.name)
        if count is None:
            continue
        expected[i] = count
        if i not in cuts and count != complete[i]:
            raise InputError(
                f"{path.parent / SIZES} says {count:,} samples in {path.name}, which holds {complete[i]:,}: "
                "get the shard again, or delete sizes.json if it is stale"
            )
    return expected
