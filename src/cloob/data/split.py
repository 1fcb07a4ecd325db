"""Held-out pairs out of the training pairs, without a picture or caption that both have: ``--val-split``.

Pairs of equal pictures (byte by byte) or equal captions (up to case and spaces) belong together, and with them what
they belong to; such a group is held out as a whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cloob.data.batch import BadSample, caption_id
from cloob.data.source import Source, Subset, mix
from cloob.errors import InputError, require
from cloob.machine import decoders, in_threads
from cloob.pictures import Encoded, Unreadable


def choose_held_out(sources: Sequence[Source], share: float) -> list[np.ndarray]:
    """The rows of each source that are held out to judge by, ascending int64; at most ``share`` of all, at least two.

    Which pairs are held out depends on their bytes alone: not on a seed, the order of the rows or the names of files.
    Groups are taken in the order of a hash until the share is reached; one that is too large for what is missing is
    left to the training, and one with a picture that cannot be decoded. Pairs that cannot be read stay there too, where
    they are counted. The sources are looked at together, so that no pair is held out of one and trained on in another.
    """
    places, groups = _groups(sources)

    def decodes(pair: int) -> bool:
        source, row = places[pair]
        try:
            Encoded(sources[source].read(row).image).rgb(reduction=8)
        except (BadSample, Unreadable):
            return False
        return True

    held: list[list[int]] = [[] for _ in sources]
    left = most = min(max(2, round(share * len(places))), len(places) - 1)
    for members in groups:
        if len(members) <= left and all(map(decodes, members)):
            left -= len(members)
            for source, row in map(places.__getitem__, members):
                held[source].append(row)
    emptied = [source.name for source, rows in zip(sources, held, strict=True) if len(rows) == len(source)]
    if most - left < 2 or emptied:
        of_all = f"val_split is {share:g}: of {len(places):,} usable pairs {most - left} can be held out"
        wrong = f"{emptied[0]}: all its pairs would be held out" if emptied else of_all
        raise InputError(f"{wrong} without a picture or caption that the others have too; give --val-data")
    return [np.array(sorted(rows), np.int64) for rows in held]


def split(sources: Sequence[Source], held_out: Sequence[np.ndarray]) -> tuple[Source, Source]:
    """The training pairs and the held-out pairs, as :func:`choose_held_out` chose them."""
    others = [np.setdiff1d(np.arange(len(source)), rows) for source, rows in zip(sources, held_out, strict=True)]
    train = [Subset(source, rows, "training") for source, rows in zip(sources, others, strict=True)]
    val = [Subset(source, rows, "held out") for source, rows in zip(sources, held_out, strict=True) if len(rows)]
    return mix(train), mix(val)


def _groups(sources: Sequence[Source]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """The readable pairs, each by source and row; and the groups of their numbers, in the order of a hash."""
    sparse, csgraph = require("scipy.sparse", "train"), require("scipy.sparse.csgraph", "train")
    first: dict[bytes | int, int] = {}  # the first pair with a picture or caption
    places: list[tuple[int, int]] = []
    hashes: list[bytes] = []
    links: list[int] = []  # from each pair to the first with its picture, and to the first with its caption

    def digests(place: tuple[int, int]) -> tuple[bytes, int] | None:
        source, row = place
        try:
            sample = sources[source].read(row)
        except BadSample:
            return None
        return hashlib.blake2b(sample.image, digest_size=16).digest(), caption_id(sample.caption)

    every = [(i, row) for i, source in enumerate(sources) for row in range(len(source))]
    workers = decoders()
    for place, keys in zip(every, in_threads(digests, every, workers, 4 * workers), strict=True):
        if keys is not None:
            links += (first.setdefault(key, len(places)) for key in keys)
            places.append(place)
            hashes.append(hashlib.blake2b(keys[0] + keys[1].to_bytes(8, "little"), digest_size=16).digest())
    edges = np.ones(len(links), bool), (np.repeat(np.arange(len(places)), 2), links)
    graph = sparse.coo_array(edges, shape=(len(places), len(places)))
    groups: dict[int, list[int]] = {}
    for pair, group in enumerate(csgraph.connected_components(graph, directed=False)[1].tolist()):
        groups.setdefault(group, []).append(pair)
    return places, sorted(groups.values(), key=lambda members: min(hashes[pair] for pair in members))
