"""Pairs in tar shards that commands or URLs give: they are fetched into a bounded cache
when they are first needed.

``pipe:COMMAND`` is run where the user typed it; other addresses go through fsspec, so
no URL reaches a shell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from cloob.cache import Cache, cache_root
from cloob.data.batch import BadSample, RawSample
from cloob.data.shards.spec import (
    SHARD_NAME,
    SIZES,
    expand,
    is_remote,
    local_path,
    matching_files,
    shard_name,
    tars_in,
)
from cloob.data.shards.tar import ShardSource
from cloob.data.source import Fingerprint, Source, digest
from cloob.data.sources.files import FileSource
from cloob.errors import InputError, one_line, require
from cloob.files import write_whole

if TYPE_CHECKING:
    from aiohttp import ClientSession, TraceRequestRedirectParams

_PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt
_SILENT_SECONDS = 60.0  # that a server may say nothing
_TRY_AGAIN = (408, 429)  # a request timed out, or there were too many
_HOW = (
    f'put {SIZES} ({{"shard.tar": count}}) next to the shards: `cloob data FOLDER'
    " --count` writes it where they are local, and with the pattern in place of FOLDER"
    " fetches the shards, counts them and remembers the counts"
)

logger = logging.getLogger(__name__)


def fetch(url: str, target: Path) -> None:
    """Writes what a URL gives into a file; tries three times, unless the server reports
    that there is nothing.
    """
    attempts = len(_PAUSES) + 1
    copy = _run if url.startswith("pipe:") else _downloader(url)
    for attempt in range(attempts):
        try:
            copy(url, target)
            return
        except InputError:
            raise
        except Exception as error:  # the errors of stores have no common base
            wrong = _reason(error)
            if _is_final(error):
                raise InputError(f"{url}: {wrong}") from error
        if attempt < len(_PAUSES):
            time.sleep(_PAUSES[attempt])
    raise InputError(f"{url}: {wrong} ({attempts} attempts)")


def _run(url: str, target: Path) -> None:
    """Writes what a command prints."""
    command = url.removeprefix("pipe:")
    with target.open("wb") as file:
        subprocess.run(command, shell=True, stdout=file, check=True)


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
        raise InputError(
            f"{url}: nothing here opens {scheme}:// ({error}); any command does as"
            " pipe:COMMAND"
        ) from None


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _TRY_AGAIN
    return isinstance(error, FileNotFoundError | PermissionError)


def _reason(error: Exception) -> str:
    """Why a file could not be fetched, in a few words."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, subprocess.CalledProcessError):
        hint = " (command not found)" if error.returncode == 127 else ""
        return f"its command ended with exit status {error.returncode}{hint}"
    if status:
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
    return one_line(error)


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
    """Samples in tars that commands or URLs give; more than the known number are left
    out, with one warning.
    """

    def __init__(
        self, name: str, counts: dict[str, int], cache: Cache, member: str | None
    ) -> None:
        super().__init__(name, tuple(counts.values()), streamed=True)
        self._urls = tuple(counts)
        self._cache = cache
        self._member = member
        self._warned = False
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
        listed = f"{SIZES} has {self.shard_sizes[shard]:,}"
        detail = f"{self._urls[shard]} holds {complete:,} samples, {listed}{cut}"
        key = f"{self.shard_names[shard]}/{row}"
        raise BadSample("truncated shard", key, detail)

    def fingerprint(self) -> Fingerprint:
        shards = zip(self.shard_names, self.shard_sizes, strict=True)
        names = digest(f"{name} {n}" for name, n in shards)
        return {"samples": len(self), "shards": names}

    def prepare(self, shard: int) -> Path:
        url = self._urls[shard]
        return self._cache.get("shards", url, lambda path: fetch(url, path))

    def load(self, shard: int, file: Path) -> ShardSource:
        """Opens a shard that was fetched; one that cannot be read is removed."""
        url = self._urls[shard]
        label = self.shard_names[shard]
        try:
            source = ShardSource(url, [file], self._cache, label, self._member)
            source.reader.read(0, 0, 0)  # stays open when the cache drops it
        except InputError as error:
            file.unlink()  # FileNotFoundError where the cache has dropped it
            wrong = str(error).removeprefix(f"{file} ")
            raise InputError(f"{url}: gave no readable shard ({wrong})") from None
        self._warn_once(url, source, self.shard_sizes[shard])
        return source

    def _warn_once(self, url: str, source: ShardSource, listed: int) -> None:
        """Warns of the first shard that is odd or holds more than is listed."""
        odd = source.remark
        complete = source.complete[0]
        if complete > listed:
            odd = (
                f"holds {complete:,} samples, {SIZES} has {listed:,}: the others are"
                " left out"
            )
        if odd and not self._warned:
            logger.warning("%s: %s (reported once)", url, odd)
            self._warned = True


def open_remote(
    spec: str, cache: Cache, member: str | None = None
) -> RemoteShardSource:
    """Opens streamed shards, whose counts are remembered on this machine or lie next to
    the shards.
    """
    urls = expand(spec, escape=False)
    counts = _read_sizes(_memory(spec))
    if not counts.keys() >= {*urls}:
        try:
            counts = _listed_counts(urls)
        except InputError as error:
            raise InputError(
                f"{spec}: the number of samples in every shard must be known;"
                f" {error}; {_HOW}"
            ) from None
    counts = {url: counts[url] for url in urls}
    return RemoteShardSource(spec, counts, cache, member)


def _listed_counts(urls: Sequence[str]) -> dict[str, int]:
    """The counts by URL, from the lists next to the shards."""
    lists: dict[str, dict[str, int]] = {}
    counts = {}
    for url in urls:
        place = _list_next_to(url)
        if place not in lists:
            lists[place] = _fetched_sizes(place)
        name = shard_name(url)
        if name not in lists[place]:
            raise InputError(f"{place}: has no count for {name}")
        counts[url] = lists[place][name]
    return counts


def _list_next_to(url: str) -> str:
    """The same URL or command for the list in the shard's folder."""
    names = list(SHARD_NAME.finditer(url))
    if not names:
        raise InputError(f"{url}: has no count for {shard_name(url)}")
    start, end = names[-1].span()
    return f"{url[:start]}{SIZES}{url[end:]}"


def _fetched_sizes(place: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SIZES
        fetch(place, path)
        return _read_sizes(path, place)


def _read_sizes(path: Path, where: str = "") -> dict[str, int]:
    """The counts in a file, none without it; ``where`` is what an error calls it."""
    if not path.is_file():
        return {}
    try:
        counts = json.loads(path.read_text(encoding="utf-8-sig"))
        is_right = all(type(count) is int and count >= 0 for count in counts.values())
    except (ValueError, RecursionError, AttributeError):
        is_right = False
    if not is_right:
        raise InputError(f'{where or path}: is not {{"shard.tar": count, …}}')
    return dict(counts)


def _memory(pattern: str) -> Path:
    """Where the counts of a pattern are remembered."""
    name = hashlib.blake2b(pattern.encode(), digest_size=16).hexdigest()
    return cache_root() / "sizes" / f"{name}.json"


def write_counts(spec: str, out: Path | None) -> tuple[Path | None, dict[str, int]]:
    """Counts the samples of shards; returns the list that was written, and the counts
    by shard. Of a local folder that list is its sizes.json.
    """
    if is_remote(spec):
        counts = _count_remote(spec, expand(spec, escape=False))
        names = list(map(shard_name, counts))
    else:
        path = Path(local_path(spec))
        if path.is_dir():
            paths, out = tars_in(path), out or path / SIZES
        elif out is None:
            raise InputError(f"{spec}: --out is missing; it names the list")
        else:
            paths = matching_files(str(path))
        counts = {str(path): _count(str(path), path) for path in paths}
        names = [path.name for path in paths]
    if not counts:
        raise InputError(f"{spec}: holds no tars")
    if out is not None:
        _write_list(out, spec, names, counts.values())
    return out, counts


def _write_list(
    out: Path, spec: str, names: Sequence[str], counts: Iterable[int]
) -> None:
    if len(set(names)) < len(names):
        raise InputError(
            f"{spec}: names of shards come twice; count each folder by itself"
        )
    listed = dict(zip(names, counts, strict=True))
    write_whole(out, json.dumps(listed, indent=1) + "\n")


def _count_remote(spec: str, shards: Sequence[str]) -> dict[str, int]:
    """Counts where an earlier count stopped; one that has ended is begun anew."""
    counts = _read_sizes(_memory(spec))
    if counts.keys() >= {*shards}:
        counts = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        for shard in shards:
            if shard not in counts:
                fetch(shard, path)
                counts[shard] = _count(shard, path)
                write_whole(_memory(spec), json.dumps(counts))
    return {shard: counts[shard] for shard in shards}


def _count(shard: str, path: Path) -> int:
    """How many samples a shard that was fetched holds; refuses a truncated one."""
    source = ShardSource(shard, [path])
    if source.cuts:
        raise InputError(f"{shard}: {source.cuts[0]}")
    if source.remark:
        remark = source.remark.replace("read", "counted", 1)
        logger.warning("%s: %s", shard, remark)
    return len(source)
