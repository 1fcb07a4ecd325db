"""Pairs in WebDataset tar shards: ``key.jpg`` and ``key.txt`` are one sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, RawSample, clean_caption
from cloob.data.decode import MAX_IMAGE_BYTES
from cloob.data.tarindex import Member, TarListing, TarReader, split_name
from cloob.errors import InputError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_EXTENSIONS = ("txt", "caption")

_ABSENT = -1
_CUT = -2  # in the image's offset: this row stands for what a truncated shard has lost


def group_members(members: Sequence[Member], extensions: Sequence[Sequence[str]]) -> dict[str, list[Member | None]]:
    """Sorts the members of a tar into samples.

    Unlike a WebDataset stream, the files of a sample need not be neighbours.

    Args:
        members: The members of one tar.
        extensions: For each part of a sample the extensions it may have, the preferred one first.

    Returns:
        For each key that has any of the parts, in order of appearance, the member of each part or None.
    """
    place = {ext: (part, rank) for part, group in enumerate(extensions) for rank, ext in enumerate(group)}
    samples: dict[str, list[Member | None]] = {}
    ranks: dict[tuple[str, int], int] = {}
    for member in members:
        names = split_name(member.name)
        if names is None or names[1] not in place:
            continue
        key, (part, rank) = names[0], place[names[1]]
        sample = samples.setdefault(key, [None] * len(extensions))
        if rank < ranks.get((key, part), len(place)):
            sample[part], ranks[key, part] = member, rank
    return samples


@dataclass(frozen=True)
class _Index:
    """One row a sample over all shards; offsets and sizes in bytes, ``_ABSENT`` where a part is missing."""

    keys: pa.ChunkedArray
    shard: np.ndarray  # (N,) int32
    places: np.ndarray  # (N, 2, 2) int64: image and caption; offset and size


class ShardSource:
    """A random-access source over WebDataset tar shards on local disks.

    A sample without an image or a caption stays in the count and raises ``BadSample`` when it is read. A truncated
    shard gives its complete samples and one more row, which raises ``"truncated shard"``: so the loss is reported in
    each epoch. Other files of a sample (.json, …) are ignored.

    Args:
        name: What reports call this source.
        paths: The tars, in order.

    Raises:
        InputError: No shard, a file that is no tar, or a count that contradicts ``sizes.json`` beside the shards.
    """

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        if not paths:
            raise InputError(f"{name}: no tar shard found")
        self.name = name
        self._reader = TarReader(tuple(paths))
        keys: list[pa.Array] = []
        shards: list[np.ndarray] = []
        places: list[np.ndarray] = []
        self._cuts: dict[int, str] = {}
        for i, path in enumerate(paths):
            listing = self._reader.listing(i)
            shard_keys, shard_places = self._index(path, i, listing)
            keys.append(pa.array(shard_keys, pa.string()))
            places.append(shard_places)
            shards.append(np.full(len(shard_keys), i, np.int32))
        self.shard_sizes = tuple(len(k) for k in keys)
        self._table = _Index(pa.chunked_array(keys, pa.string()), np.concatenate(shards), np.concatenate(places))

    def _index(self, path: Path, number: int, listing: TarListing) -> tuple[list[str], np.ndarray]:
        samples = group_members(listing.members, (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS))
        expected = _expected_size(path)
        cut = listing.cut
        if cut is not None:
            if samples:
                # The last sample of a cut shard may have lost its second file: it is part of the loss, not one more.
                last = next(reversed(samples))
                if None in samples[last]:
                    del samples[last]
            told = f", sizes.json says {expected:,}" if expected is not None else ""
            self._cuts[number] = f"{path}: {cut}; {len(samples):,} samples are complete{told}"
        elif expected is not None and expected != len(samples):
            raise InputError(
                f"{path.parent / 'sizes.json'} says {expected:,} samples in {path.name}, which holds {len(samples):,}: "
                "get the shard again, or delete sizes.json if it is stale"
            )
        keys = list(samples)
        places = [
            [(member.offset, member.size) if member else (_ABSENT, 0) for member in sample]
            for sample in samples.values()
        ]
        if cut is not None:
            keys.append("")
            places.append([(_CUT, 0), (_CUT, 0)])
        return keys, np.array(places, np.int64).reshape(-1, 2, 2)

    def __len__(self) -> int:
        return len(self._table.shard)

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is ``shard file/key in the shard``.

        Raises:
            BadSample: It cannot be used.
        """
        shard = int(self._table.shard[index])
        path = self._reader.paths[shard]
        (image_at, image_size), (caption_at, caption_size) = self._table.places[index].tolist()
        if image_at == _CUT:
            raise BadSample("truncated shard", path.name, self._cuts[shard])
        key = f"{path.name}/{self._table.keys[index].as_py()}"
        if image_at == _ABSENT:
            raise BadSample("missing image", key, f"no {'/'.join(IMAGE_EXTENSIONS)} member of this name in {path}")
        if caption_at == _ABSENT:
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


def _expected_size(path: Path) -> int | None:
    """What ``sizes.json`` beside a shard says of it; None when there is no such file or no such entry."""
    sizes = path.parent / "sizes.json"
    try:
        told = json.loads(sizes.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{sizes} cannot be read: {error}") from None
    count = told.get(path.name) if isinstance(told, dict) else None
    return count if isinstance(count, int) else None
