"""Pairs in tar shards at addresses that fsspec opens: fetched into the bounded cache
when they are first needed. No address reaches a shell.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import numpy as np
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from cloob.cache import Cache
from cloob.data.batch import BadSample, RawSample
from cloob.data.shards.spec import expand
from cloob.data.shards.tar import ShardSource
from cloob.data.source import Fingerprint, Source, digest, place_in, starts_of
from cloob.errors import InputError, one_line, require

if TYPE_CHECKING:
    from aiohttp import ClientSession, TraceRequestRedirectParams
    from fsspec.implementations.http import HTTPFileSystem

_PAUSES = (0.0, 1.0, 4.0)  # seconds before every attempt
_SILENT_SECONDS = 60.0  # that a server may say nothing
_ABSENT = (FileNotFoundError, PermissionError)  # S3 forbids what is not there
_SIZES = "sizes.json"
_MOST_OPEN = 32
_MOST_EARLY = 64  # shards that are not announced again
_early_downloads = threading.Semaphore(2)  # at the same time, by every process
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
            fault = one_line(error)
    raise InputError(f"{url}: {fault} ({len(_PAUSES)} attempts)")


def _downloader(url: str) -> Callable[[str, str], object]:
    """What copies a file of this URL's scheme.

    By scheme alone: a complete URL would also be taken for a chain of file systems
    (``zip::…``).
    """
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return _web(url).get_file  # type: ignore[no-any-return]
    try:
        return fsspec.filesystem(scheme).get_file  # type: ignore[no-any-return]
    except (ValueError, ImportError) as error:  # which names the package that does it
        raise InputError(f"{url}: nothing here opens {scheme}:// ({error})") from None


def _web(url: str) -> HTTPFileSystem:
    """The file system of http(s), which does not follow a redirection that leaves
    encryption.
    """
    aiohttp = require("aiohttp", "train")

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


class RemoteShardSource(Source):
    """Samples in tars at addresses; more than the listed number are left out, with a
    warning.
    """

    streamed = True

    def __init__(self, name: str, counts: dict[str, int]) -> None:
        self._arguments = name, counts
        self.name = name
        self._urls = tuple(counts)
        # without what comes before them (a bucket, a token)
        self.shard_names = tuple(map(shard_name, counts))
        self.shard_sizes = tuple(counts.values())
        self._starts = starts_of(self.shard_sizes)
        self._opened = lru_cache(_MOST_OPEN)(self._open)
        self._fetch_early_once = lru_cache(_MOST_EARLY)(self._fetch_early)

    def __reduce__(self) -> tuple[object, ...]:  # another process opens its own
        return RemoteShardSource, self._arguments

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; InputError names a shard that cannot be fetched."""
        shard, row = place_in(self._starts, index)
        source = self._opened(shard)
        if row < len(source):
            return source.read(row)
        listed = f"{_SIZES} has {self.shard_sizes[shard]:,}"
        detail = f"{self._urls[shard]} holds {len(source):,} samples, {listed}"
        raise BadSample("truncated shard", f"{self.shard_names[shard]}/{row}", detail)

    def fingerprint(self) -> Fingerprint:
        shards = zip(self.shard_names, self.shard_sizes, strict=True)
        names = digest(f"{name} {n}" for name, n in shards)
        return {"samples": len(self), "shards": names}

    def prefetch(self, indices: np.ndarray) -> None:
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards).tolist():
            self._fetch_early_once(shard)

    def _fetch_early(self, shard: int) -> None:
        """Begins to fetch a shard; what fails now shows when a row is read."""

        def fetch_in_turn() -> None:
            with _early_downloads, contextlib.suppress(InputError, OSError):
                self._fetched(shard)

        # a daemon: the end of the program does not wait for it
        threading.Thread(target=fetch_in_turn, name="prefetch", daemon=True).start()

    def _fetched(self, shard: int) -> Path:
        url = self._urls[shard]
        return Cache().get("shards", url, lambda path: fetch(url, path))

    def _open(self, shard: int) -> ShardSource:
        source = self._open_file(shard)
        url, listed = self._urls[shard], self.shard_sizes[shard]
        if len(source) > listed:
            message = "%s: holds %d samples, %s has %d: the others are left out"
            logger.warning(message, url, len(source), _SIZES, listed)
        if source.remark:
            logger.warning("%s: %s", url, source.remark)
        return source

    def _open_file(self, shard: int) -> ShardSource:
        """A shard, fetched where it is not there; one that cannot be read is
        removed.
        """
        url, file = self._urls[shard], self._fetched(shard)
        try:
            source = ShardSource(url, [file], self.shard_names[shard])
            source.reader.read(0, 0, 0)  # stays open when the cache drops it
        except FileNotFoundError:  # another process has made room in between
            return self._open_file(shard)
        except InputError as error:
            file.unlink()
            fault = str(error).removeprefix(f"{file} ")
            raise InputError(f"{url}: gave no readable shard ({fault})") from None
        return source


def shard_name(url: str) -> str:
    """The last name in the path of a URL."""
    name = _LAST_NAME.search(url)
    return name[0] if name else url[-80:]


def open_remote(spec: str) -> RemoteShardSource:
    """Opens streamed shards, whose numbers of samples are listed next to them."""
    list_of = {url: _LAST_NAME.sub(_SIZES, url, count=1) for url in expand(spec)}
    listed = {list_url: _listed_counts(list_url) for list_url in {*list_of.values()}}
    counts = {}
    for url, list_url in list_of.items():
        name = shard_name(url)
        if name not in listed[list_url]:
            raise InputError(f"{list_url}: does not count the samples of {name}")
        counts[url] = listed[list_url][name]
    return RemoteShardSource(spec, counts)


def _listed_counts(list_url: str) -> dict[str, int]:
    """The numbers of samples by shard that an address lists."""
    expected = '{"shard.tar": number of samples, …}'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _SIZES
        try:
            fetch(list_url, path)
            counts = TypeAdapter(dict[str, NonNegativeInt])
            return counts.validate_json(path.read_bytes(), strict=True)
        except ValidationError:
            raise InputError(f"{list_url}: is not {expected}") from None
        except InputError as error:
            raise InputError(
                f"{error}; next to streamed shards has to lie {_SIZES}, {expected}"
            ) from error
