"""Pairs in tar shards that lie elsewhere: each shard is fetched whole into a bounded cache when it is first needed."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cloob.cache import Cache, touch
from cloob.data.batch import BadSample, RawSample
from cloob.data.fingerprint import Fingerprint, digest
from cloob.data.prefetch import Prefetcher
from cloob.data.shards.fetch import fetch
from cloob.data.shards.local import ShardSource
from cloob.data.shards.sizes import SIZES, fetch_sizes, listed_url, remembered
from cloob.data.shards.spec import expand, shard_name, sibling
from cloob.data.shards.tar import make_plain
from cloob.errors import InputError

logger = logging.getLogger(__name__)
_MAX_OPEN_SHARDS = 32
_TOUCH_EVERY = 1000  # reads


class RemoteShardSource:
    """A random-access source over WebDataset tars behind commands or URLs.

    The number of samples in each shard has to be known beforehand (``sizes.json``), so that the order of an epoch is
    known without reading anything. A row that a shard turns out not to hold raises ``"truncated shard"``; samples
    beyond that number are left out, with one warning. Read it shard by shard (``streamed`` is True: the loader
    does): in random order each sample would cost a shard.

    Args:
        name: What reports call this source.
        urls: What ``fetch`` opens, one a shard.
        counts: Samples in each shard.
        cache: Where the shards are kept.
    """

    streamed = True

    def __init__(self, name: str, urls: Sequence[str], counts: Sequence[int], cache: Cache) -> None:
        self.name = name
        self.shard_sizes = tuple(counts)
        self._urls = tuple(urls)
        self._cache = cache
        self._ends = np.cumsum(counts)
        self._prefetcher = Prefetcher(self.fetch_shard)
        self._forget()

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The shards' file names, without what is before them (a bucket, a token)."""
        return tuple(map(shard_name, self._urls))

    def _forget(self) -> None:
        self._opened: OrderedDict[int, ShardSource] = OrderedDict()
        self._paths: dict[int, Path] = {}
        self._reads = 0
        self._warned = False
        self._pid = os.getpid()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; its key is ``shard file/key in the shard``. May fetch the shard first.

        Raises:
            BadSample: It cannot be used.
            InputError: The shard cannot be fetched; names it and the exit status of its command.
        """
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[shard]) + self.shard_sizes[shard]
        source = self._open(shard)
        if row >= source.complete[0]:
            url, cut = self._urls[shard], f": {source.cuts[0]}" if 0 in source.cuts else ""
            counts = f"holds {source.complete[0]:,} samples, {SIZES} says {self.shard_sizes[shard]:,}"
            raise BadSample("truncated shard", f"{shard_name(url)}/{row}", f"{url} {counts}{cut}")
        return source.read(row)

    def fingerprint(self) -> Fingerprint:
        """The shards' names and counts; nothing is fetched. What is before a name (a bucket, a token) is left out."""
        shards = zip(map(shard_name, self._urls), self.shard_sizes, strict=True)
        return {"samples": len(self), "shards": digest(f"{name} {n}" for name, n in shards)}

    def prefetch(self, indices: np.ndarray) -> None:
        """Has the shards of these pairs fetched in the background; failures show when a pair is read."""
        self._prefetcher.want(np.unique(np.searchsorted(self._ends, indices, side="right")).tolist())

    def fetch_shard(self, shard: int) -> Path:
        """The shard's file in the cache, fetched now if it is not there."""
        url = self._urls[shard]
        return self._cache.get("shards", url, lambda path: fetch_tar(url, path))

    def _open(self, shard: int) -> ShardSource:
        if self._pid != os.getpid():  # forked: the parent's handles are closed here, and its files may be gone
            self._forget()
        self._reads += 1
        if shard in self._opened:
            self._opened.move_to_end(shard)
            if self._reads % _TOUCH_EVERY == 0:
                for path in self._paths.values():
                    touch(path)
            return self._opened[shard]
        for last in (False, False, True):
            path = self.fetch_shard(shard)
            try:
                source = self._index(shard, path)
                source.hold()
                break
            except OSError:  # another process has made room in between
                if last:
                    raise
        self._opened[shard], self._paths[shard] = source, path
        if len(self._opened) > _MAX_OPEN_SHARDS:
            self._paths.pop(self._opened.popitem(last=False)[0])
        url, held, listed = self._urls[shard], source.complete[0], self.shard_sizes[shard]
        if held > listed:
            self._warn(f"{url} holds {held:,} samples, {SIZES} says {listed:,}: the others are left out")
        if source.left_out:
            self._warn(f"{url}: not read: {'; '.join(source.left_out)}")
        return source

    def _warn(self, said: str) -> None:
        if not self._warned:
            logger.warning("%s (said once)", said)
        self._warned = True

    def _index(self, shard: int, path: Path) -> ShardSource:
        url = self._urls[shard]
        try:
            return ShardSource(url, [path], labels=[shard_name(url)], cache=self._cache, cached=True)
        except InputError as error:
            if not path.exists():
                raise FileNotFoundError(str(path)) from None
            self._cache.drop(path)
            raise InputError(f"{url}: gave no readable shard ({str(error).removeprefix(f'{path} ')})") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "urls": self._urls, "counts": self.shard_sizes, "cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def fetch_tar(url: str, path: Path) -> None:
    """Writes a tar into a file, unpacked; errors as of ``fetch``."""
    fetch(url, path)
    try:
        make_plain(path)
    except InputError as error:
        raise InputError(f"{url}: gave no readable shard ({str(error).removeprefix(f'{path} ')})") from None


def open_remote(spec: str, cache: Cache) -> RemoteShardSource:
    """Opens streamed shards: a brace pattern of them, or their ``sizes.json``.

    Raises:
        InputError: No counts, they cannot be fetched, or the list names what it may not.
    """
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
        if place not in listed:
            assert place is not None
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
