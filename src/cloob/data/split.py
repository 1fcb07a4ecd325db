"""Held-out pairs out of the training pairs, without a picture or caption that both have: ``--val-split``.

Pairs of equal pictures (byte by byte) or equal captions (up to case and spaces) belong together, and with them what
they belong to; such a group is held out as a whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cloob.data.batch import BadSample, RawSample, caption_id
from cloob.data.fingerprint import Fingerprint, digest
from cloob.data.mix import mix
from cloob.data.shards.spec import is_remote
from cloob.data.source import Source
from cloob.errors import InputError
from cloob.pictures import Encoded, Unreadable


class Subset:
    """Some rows of a source, ascending int64; ``part`` says which they are: ``training`` or ``held out``."""

    def __init__(self, whole: Source, rows: np.ndarray, part: str) -> None:
        self.whole, self.rows, self.part = whole, rows, part
        self.name, self.streamed = f"{whole.name} ({part})", whole.streamed
        # Rows that are left of each file; files of which nothing is left do not count.
        ends = np.searchsorted(rows, np.cumsum(whole.shard_sizes))
        self.shard_sizes = tuple(size for start, end in pairwise([0, *ends.tolist()]) if (size := end - start))

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> Fingerprint:
        return {**self.whole.fingerprint(), "pairs": len(self), f"rows that are {self.part}": digest([self.rows])}

    def read(self, index: int) -> RawSample:
        return self.whole.read(int(self.rows[index]))

    def prefetch(self, indices: np.ndarray) -> None:
        if (fetch := getattr(self.whole, "prefetch", None)) is not None:
            fetch(self.rows[indices])


def choose_held_out(sources: Sequence[Source], share: float) -> list[np.ndarray]:
    """The rows of each source that are held out to judge by, ascending int64; at most ``share`` of all, at least two.

    Which pairs are held out depends on their bytes alone: not on a seed, the order of the rows or the names of files.
    Groups are taken in the order of a hash until the share is reached; one that is too large for what is missing is
    left to the training, and one with a picture that cannot be decoded. Pairs that cannot be read stay there too, where
    they are counted. The sources are looked at together, so that no pair is held out of one and trained on in another.
    """
    for source in sources:
        if is_remote(source.name):
            raise InputError(
                f"{source.name}: streamed pairs would all be fetched to hold some out; give --val-data in place of "
                "--val-split"
            )
    places, groups = _groups(sources)

    def decodes(pair: int) -> bool:
        source, row = places[pair]
        try:
            Encoded(sources[source].read(row).image).rgb(reduction=8)
        except (BadSample, Unreadable):
            return False
        return True

    held: list[int] = []
    left = min(max(2, round(share * len(places))), len(places) - 1)
    for members in groups:
        if len(members) <= left and all(map(decodes, members)):
            held += members
            left -= len(members)
    held_out = [
        np.array(sorted(row for source, row in map(places.__getitem__, held) if source == i), np.int64)
        for i in range(len(sources))
    ]
    emptied = [source.name for source, rows in zip(sources, held_out, strict=True) if len(rows) == len(source)]
    if len(held) < 2 or emptied:
        of_all = f"val_split is {share:g}: of {len(places):,} usable pairs {len(held)} can be held out"
        wrong = f"{emptied[0]}: all its pairs would be held out" if emptied else of_all
        raise InputError(f"{wrong} without a picture or caption that the others have too; give --val-data")
    return held_out


def split(sources: Sequence[Source], held_out: Sequence[np.ndarray]) -> tuple[Source, Source]:
    """The training pairs and the held-out pairs, as :func:`choose_held_out` chose them."""
    others = [np.setdiff1d(np.arange(len(source)), rows) for source, rows in zip(sources, held_out, strict=True)]
    train = [Subset(source, rows, "training") for source, rows in zip(sources, others, strict=True)]
    val = [Subset(source, rows, "held out") for source, rows in zip(sources, held_out, strict=True) if len(rows)]
    return mix(train), mix(val)


def _groups(sources: Sequence[Source]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The readable pairs, each by source and row; and the groups of their numbers, in the order of a hash."""
    parent: list[int] = []
    first: dict[bytes | int, int] = {}  # the first pair with a picture or caption
    places: list[tuple[int, int]] = []
    hashes: list[bytes] = []

    def root(pair: int) -> int:
        while parent[pair] != pair:
            parent[pair] = parent[parent[pair]]
            pair = parent[pair]
        return pair

    for i, source in enumerate(sources):
        for row in range(len(source)):
            try:
                sample = source.read(row)
            except BadSample:
                continue
            picture, caption = hashlib.blake2b(sample.image, digest_size=16).digest(), caption_id(sample.caption)
            pair = len(parent)
            parent.append(pair)
            places.append((i, row))
            hashes.append(hashlib.blake2b(picture + caption.to_bytes(8, "little"), digest_size=16).digest())
            for key in (picture, caption):
                parent[root(pair)] = root(first.setdefault(key, pair))
    groups: dict[int, list[int]] = {}
    for pair in range(len(parent)):
        groups.setdefault(root(pair), []).append(pair)
    return places, sorted(groups.values(), key=lambda members: min(hashes[pair] for pair in members))
