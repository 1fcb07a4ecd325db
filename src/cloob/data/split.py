"""Held-out pairs out of the training pairs, without a picture or caption that both have: ``--val-split``.

Pairs of equal pictures (byte by byte) or equal captions (up to case and spaces) belong together, and with them what
they belong to; such a group is held out as a whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
        """The source's, and which rows."""
        return {**self.whole.fingerprint(), "pairs": len(self), f"rows that are {self.part}": digest([self.rows])}

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; raises ``BadSample`` when it cannot be used."""
        return self.whole.read(int(self.rows[index]))

    def prefetch(self, indices: np.ndarray) -> None:
        """Passes on to the source what will be read soon."""
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
    places, groups, hashes = _groups(sources)

    def decodes(pair: int) -> bool:
        source, row = places[pair].tolist()
        try:
            Encoded(sources[source].read(row).image).rgb(reduction=8)
        except (BadSample, Unreadable):
            return False
        return True

    held = _choose(groups, hashes, most_held_out(len(places), share), decodes)
    n_held = int(held.sum())
    if n_held < 2:
        raise InputError(
            f"val_split is {share:g}: of {len(places):,} usable pairs {n_held} can be held out without a picture or "
            "caption that the others have too; give another share, or --val-data"
        )
    rows = [places[held & (places[:, 0] == i), 1] for i in range(len(sources))]
    for source, some in zip(sources, rows, strict=True):
        if len(some) == len(source):
            raise InputError(f"{source.name}: all its pairs would be held out; give a lower --val-split, or --val-data")
    return rows


def split(sources: Sequence[Source], held_out: Sequence[np.ndarray]) -> tuple[Source, Source]:
    """The training pairs and the held-out pairs, as :func:`choose_held_out` chose them."""
    others = [np.setdiff1d(np.arange(len(source)), rows) for source, rows in zip(sources, held_out, strict=True)]
    train = [Subset(source, rows, "training") for source, rows in zip(sources, others, strict=True)]
    val = [Subset(source, rows, "held out") for source, rows in zip(sources, held_out, strict=True) if len(rows)]
    return mix(train), mix(val)


def most_held_out(pairs: int, share: float) -> int:
    """How many of so many readable pairs ``split`` holds out at most."""
    return max(2, round(share * pairs))


def _groups(sources: Sequence[Source]) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Of every readable pair its place (n, 2): source and row; its group (n,), a number of one of its pairs; a hash."""
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
    roots = np.array([root(pair) for pair in range(len(parent))], dtype=np.int64)
    return np.array(places, dtype=np.int64).reshape(-1, 2), roots, hashes


def _choose(groups: np.ndarray, hashes: Sequence[bytes], target: int, usable: Callable[[int], bool]) -> np.ndarray:
    """(n,) bool: the pairs of the groups that are taken, all usable, at most ``target`` and never all pairs."""
    by_group: dict[int, list[int]] = {}
    for pair, group in enumerate(groups.tolist()):
        by_group.setdefault(group, []).append(pair)
    held = np.zeros(len(groups), dtype=bool)
    left = min(target, len(groups) - 1)
    for members in sorted(by_group.values(), key=lambda pairs: min(hashes[pair] for pair in pairs)):
        if len(members) <= left and all(map(usable, members)):
            held[members] = True
            left -= len(members)
    return held
