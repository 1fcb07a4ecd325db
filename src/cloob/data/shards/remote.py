"""Pairs in tar shards at addresses that fsspec opens: fetched into the bounded cache
when they are first needed. No address reaches a shell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from cloob.cache import Cache, cache_root, locked
from cloob.data.batch import BadSample, RawSample
from cloob.data.shards.spec import expand
from cloob.data.shards.tar import ShardSource, TarReader, scan
from cloob.data.source import Fingerprint, Source, digest
from cloob.data.sources.files import FileSource
from cloob.errors import InputError, counted, one_line, require
from cloob.files import write_whole

if TYPE_CHECKING:
    from aiohttp import ClientSession, TraceRequestRedirectParams

_PAUSES = (0.0, 1.0, 4.0)  # seconds before every attempt
_SILENT_SECONDS = 60.0  # that a server may say nothing
_ABSENT = (FileNotFoundError, PermissionError)  # S3 forbids what is not there
_SIZES = "sizes.json"
# of an address: behind its host, before its query
_LAST_NAME = re.compile(r"(?<=[^/]/)[^/?#]+(?=$|[?#])")

logger = logging.getLogger(__name__)


def fetch(url: str, target: Path) -> None:
    """Writes what a URL gives into a file; tries three times where there may be
    something.
    """
    copy = _downloader(url)
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            copy(url, str(target))
            return
        except InputError:
            raise
        except _ABSENT as error:
            raise InputError(f"{url}: no such file, or not for you") from error
        except Exception as error:  # the errors of stores have no common base
            wrong = one_line(error)
    raise InputError(f"{url}: {wrong} ({len(_PAUSES)} attempts)")


def _downloader(url: str) -> Any:
    """What copies a file of this URL's scheme.

    By scheme alone: a complete URL would also be taken for a chain of file systems
    (``zip::…``).
    """
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return _web(url).get_file
    try:
        return fsspec.filesystem(scheme).get_file
    except (ValueError, ImportError) as error:  # which names the package that does it
        raise InputError(f"{url}: nothing here opens {scheme}:// ({error})") from None


def _web(url: str) -> Any:
    """The file system of http(s), which does not follow a redirection that leaves
    encryption.
    """
    aiohttp: Any = require("aiohttp", "train")

    async def check_redirect(
        _session: ClientSession,
        _context: object,
        parameters: TraceRequestRedirectParams,
    ) -> None:
        to = parameters.response.headers.get("Location", "")
        if parameters.url.scheme == "https" and to.lower().startswith("http:"):
            raise InputError(
                f"{url}: leads from https: to {to[:200]}, which is refused"
            )

    traces = aiohttp.TraceConfig()
    traces.on_request_redirect.append(check_redirect)
    # aiohttp's limit of five minutes in all would end large shards.
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=30, sock_read=_SILENT_SECONDS
    )
    options = {
        "timeout": timeout,
        "trust_env": True,  # proxies
        "trace_configs": [traces],
        # the bytes as they lie there: a compressed tar stays one
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
    }
    # Sent as it was typed, as signed addresses want it.
    is_encoded = re.fullmatch("[!-~]+", url) is not None
    return fsspec.filesystem(
        "http", client_kwargs=options, encoded=is_encoded, skip_instance_cache=True
    )


class RemoteShardSource(FileSource[ShardSource], Source):
    """Samples in tars at addresses; more than the known number are left out, with a
    warning.
    """

    def __init__(self, name: str, counts: dict[str, int]) -> None:
        super().__init__(name, counts.values(), streamed=True)
        self._urls = tuple(counts)
        # without what comes before them (a bucket, a token)
        self.shard_names = tuple(map(shard_name, counts))

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; InputError names a shard that cannot be fetched."""
        shard, row = self.place(index)
        source = self.opened(shard)
        complete = source.complete[0]
        if row < complete:
            return source.read(row)
        cut = f": {source.cuts[0]}" if source.cuts else ""
        listed = f"{_SIZES} has {self.shard_sizes[shard]:,}"
        detail = f"{self._urls[shard]} holds {complete:,} samples, {listed}{cut}"
        key = f"{self.shard_names[shard]}/{row}"
        raise BadSample("truncated shard", key, detail)

    def fingerprint(self) -> Fingerprint:
        shards = zip(self.shard_names, self.shard_sizes, strict=True)
        names = digest(f"{name} {n}" for name, n in shards)
        return {"samples": len(self), "shards": names}

    def prepare(self, shard: int) -> Path:
        url = self._urls[shard]
        return Cache().get("shards", url, lambda path: fetch(url, path))

    def load(self, shard: int, file: Path) -> ShardSource:
        """Opens a shard that was fetched; one that cannot be read is removed."""
        url = self._urls[shard]
        label = self.shard_names[shard]
        try:
            source = ShardSource(url, [file], label)
            source.reader.read(0, 0, 0)  # stays open when the cache drops it
        except InputError as error:
            file.unlink()  # FileNotFoundError where the cache has dropped it
            wrong = str(error).removeprefix(f"{file} ")
            raise InputError(f"{url}: gave no readable shard ({wrong})") from None
        n, listed = source.complete[0], self.shard_sizes[shard]
        if n > listed:
            logger.warning(
                "%s: holds %s samples, %s has %s: the others are left out",
                *(url, f"{n:,}", _SIZES, f"{listed:,}"),
            )
        if source.remark:
            logger.warning("%s: %s", url, source.remark)
        return source


def shard_name(url: str) -> str:
    """The last name in the path of a URL."""
    name = _LAST_NAME.search(url)
    return name[0] if name else url[-80:]


def open_remote(spec: str) -> RemoteShardSource:
    """Opens streamed shards, whose numbers of samples are listed next to them or
    counted once on this machine.
    """
    urls = expand(spec)
    counts = _listed_counts(urls)
    if not counts.keys() >= {*urls}:
        counts = _counted(spec, urls, counts)
    return RemoteShardSource(spec, {url: counts[url] for url in urls})


def _counted(spec: str, urls: Sequence[str], listed: dict[str, int]) -> dict[str, int]:
    """The counts of all shards; those that are not listed are fetched, counted and
    remembered one by one, so that another start goes on there.
    """
    name = hashlib.blake2b(spec.encode(), digest_size=16).hexdigest()
    memory = cache_root() / "sizes" / f"{name}.json"
    memory.parent.mkdir(parents=True, exist_ok=True)
    with locked(memory.with_suffix(".lock")), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        text = memory.read_text() if memory.is_file() else "{}"
        counts = _counts(text, str(memory)) | listed
        missing = [url for url in urls if url not in counts]
        if missing:
            how = f"fetching {counted(len(missing), 'shards')} once to count samples"
            logger.warning("%s: not all in a %s; %s", spec, _SIZES, how)
        for url in missing:
            fetch(url, path)
            counts[url] = _count(url, path)
            write_whole(memory, json.dumps(counts))
    return counts


def _count(url: str, path: Path) -> int:
    """How many samples a shard that was fetched holds; refuses a truncated one."""
    index = json.loads(scan(TarReader((path,))).schema.metadata[b"cloob"])
    if index["cuts"]:
        raise InputError(f"{url}: {index['cuts']['0']}")
    return int(index["complete"][0])


def _listed_counts(urls: Sequence[str]) -> dict[str, int]:
    """The counts by URL, of the shards that a list next to them names."""
    lists: dict[str, dict[str, int]] = {}
    found = {}
    for url in urls:
        place = _LAST_NAME.sub(_SIZES, url, count=1)
        if place == url:  # no shard's name that the list's could replace
            continue
        if place not in lists:
            lists[place] = _fetched_sizes(place)
        name = shard_name(url)
        if name in lists[place]:
            found[url] = lists[place][name]
    return found


def _fetched_sizes(place: str) -> dict[str, int]:
    """The list at an address, empty where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _SIZES
        try:
            fetch(place, path)
        except InputError as error:
            if isinstance(error.__cause__, _ABSENT):
                return {}
            raise
        return _counts(path.read_text(encoding="utf-8-sig"), place)


def _counts(text: str, where: str) -> dict[str, int]:
    """The counts in a list; ``where`` is what an error calls it."""
    try:
        counts = json.loads(text)
        is_right = all(type(count) is int and count >= 0 for count in counts.values())
    except (ValueError, RecursionError, AttributeError):
        is_right = False
    if not is_right:
        raise InputError(f'{where}: is not {{"shard.tar": count, …}}')
    return dict(counts)
