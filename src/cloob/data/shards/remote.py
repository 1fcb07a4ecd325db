"""Pairs in tar shards that lie elsewhere: each shard is fetched into a bounded cache when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from cloob.cache import Cache
from cloob.data.batch import BadSample, RawSample
from cloob.data.fingerprint import Fingerprint, digest
from cloob.data.shards.count import fetch_sizes, remembered
from cloob.data.shards.fetch import fetch_tar
from cloob.data.shards.local import ShardSource
from cloob.data.shards.paths import SIZES, listed_url
from cloob.data.shards.spec import expand, shard_name, sibling
from cloob.data.sources.files import FileSource
from cloob.errors import InputError

logger = logging.getLogger(__name__)


class RemoteShardSource(FileSource[ShardSource]):
    """A random-access source over WebDataset tars behind commands or URLs.

    The number of samples in each shard has to be known beforehand (``sizes.json``), so that the order of an epoch is
    known without reading anything. A row that a shard turns out not to hold raises ``"truncated shard"``; samples
    beyond that number are left out, with one warning. ``urls`` are what ``fetch`` opens, one a shard.
    """

    def __init__(self, name: str, urls: Sequence[str], counts: Sequence[int], cache: Cache) -> None:
        super().__init__(name, counts, streamed=True)
        self._urls = tuple(urls)
        self._cache = cache
        self._warned = False
        self.shard_names = tuple(map(shard_name, urls))  # without what comes before them (a bucket, a token)

    def read(self, index: int) -> RawSample:
        """The pair at ``index``, or a ``BadSample``; its key is ``shard file/key in the shard``.

        InputError where the shard cannot be fetched: it names the shard and the exit status of its command.
        """
        shard, row = self.place(index)
        source = self.opened(shard)
        if row < source.complete[0]:
            return source.read(row)
        cut = f": {source.cuts[0]}" if source.cuts else ""
        counts = f"holds {source.complete[0]:,} samples, {SIZES} says {self.shard_sizes[shard]:,}"
        raise BadSample("truncated shard", f"{self.shard_names[shard]}/{row}", f"{self._urls[shard]} {counts}{cut}")

    def fingerprint(self) -> Fingerprint:
        """The shards' names and counts; nothing is fetched."""
        shards = zip(self.shard_names, self.shard_sizes, strict=True)
        return {"samples": len(self), "shards": digest(f"{name} {n}" for name, n in shards)}

    def prepare(self, shard: int) -> Path:
        """The shard's file in the cache, fetched now if it is not there."""
        url = self._urls[shard]
        return self._cache.get("shards", url, lambda path: fetch_tar(url, path))

    def load(self, shard: int, file: Path) -> ShardSource:
        """Opens a fetched shard, and warns once of what it holds that is not read."""
        url, listed = self._urls[shard], self.shard_sizes[shard]
        try:
            source = ShardSource(url, [file], cache=self._cache, label=self.shard_names[shard])
        except InputError as error:
            if not file.exists():
                raise FileNotFoundError(str(file)) from None
            self._cache.drop(file)
            raise InputError(f"{url}: gave no readable shard ({str(error).removeprefix(f'{file} ')})") from None
        source.hold()
        more = f"{url} holds {source.complete[0]:,} samples, {SIZES} says {listed:,}: the others are left out"
        odd = f"{url}: not read: {'; '.join(source.left_out)}"
        said = [more] * (source.complete[0] > listed) + [odd] * bool(source.left_out)
        if said and not self._warned:
            logger.warning("%s (said once)", said[0])
            self._warned = True
        return source


def open_remote(spec: str, cache: Cache) -> RemoteShardSource:
    """Opens streamed shards: a brace pattern of them, or their ``sizes.json``."""
    if spec.rstrip("/- ").lower().endswith(".json"):
        sizes = fetch_sizes(spec)
        if not sizes:
            raise InputError(f"{spec}: names no shard")
        return RemoteShardSource(spec, [listed_url(spec, name) for name in sizes], list(sizes.values()), cache)
    urls = expand(spec, escape=False)
    counted = remembered(spec)
    if not all(url in counted for url in urls):
        counted = _counts_beside(spec, urls)
    return RemoteShardSource(spec, urls, [counted[url] for url in urls], cache)


def _counts_beside(spec: str, urls: Sequence[str]) -> dict[str, int]:
    """The count of each shard, from the ``sizes.json`` in its folder."""
    listed: dict[str | None, dict[str, int]] = {None: {}}
    counts: dict[str, int] = {}
    for url in urls:
        place = sibling(url, SIZES)
        if place is not None and place not in listed:
            try:
                listed[place] = fetch_sizes(place)
            except InputError as error:
                raise InputError(f"{spec}: the number of samples in each shard must be known; {error}{_HOW}") from None
        count = listed[place].get(shard_name(url))
        if count is None:
            raise InputError(f"{place or url}: has no count for {shard_name(url)}{_HOW}")
        counts[url] = count
    return counts


_HOW = (
    '; put sizes.json ({"shard.tar": count}) beside the shards: "cloob data FOLDER --count" writes it where they are '
    "local, and with the pattern in place of FOLDER fetches the shards, counts them and remembers the counts"
)
