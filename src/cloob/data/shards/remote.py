"""Pairs in tar shards that commands or URLs give: they are fetched into a bounded cache
when they are first needed.

``pipe:COMMAND`` is run where the user typed it; other addresses go through fsspec, so
no URL reaches a shell.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

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
from cloob.data.source import Fingerprint, digest
from cloob.data.sources.arrow import FileSource
from cloob.errors import InputError, one_line, require
from cloob.files import write_whole

_PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt
_SILENT_SECONDS = 60.0  # that a server may say nothing
_DISK_FAULTS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
)  # here, not at the source
_HOW = (
    '; put sizes.json ({"shard.tar": count}) next to the shards: "cloob data FOLDER'
    ' --count" writes it where they are local, and with the pattern in place of FOLDER'
    " fetches the shards, counts them and remembers the counts"
)

logger = logging.getLogger(__name__)


def fetch(url: str, target: Path) -> None:
    """Writes what a URL gives into a file; tries three times, unless the server reports
    that there is nothing.
    """
    for pause in (0.0, *_PAUSES):
        time.sleep(pause)
        final = False
        if url.startswith("pipe:"):
            with target.open("wb") as file:
                status = subprocess.run(
                    url.removeprefix("pipe:"), shell=True, stdout=file, check=False
                ).returncode
            hint = " (command not found)" if status == 127 else ""
            wrong = (
                f"its command ended with exit status {status}{hint}" if status else None
            )
        else:
            wrong, final = _download(url, target)
        if wrong is None:
            return
        if final:
            break
    raise InputError(
        f"{url}: {wrong}{'' if final else f' ({len(_PAUSES) + 1} attempts)'}"
    )


def _download(url: str, target: Path) -> tuple[str | None, bool]:
    """Copies a file by fsspec; returns what went wrong, and whether trying again is of
    no use.
    """
    progress, scheme = Callback(), url.partition("://")[0].lower()
    try:
        # By scheme alone: a complete URL would also be taken for a chain of file
        # systems (``zip::…``).
        filesystem = (
            _web(url) if scheme in ("http", "https") else fsspec.filesystem(scheme)
        )
    except (ValueError, ImportError) as error:  # which names the package that does it
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{url}: nothing here opens {scheme}:// ({error}); any command does as"
            " pipe:COMMAND"
        ) from None
    try:
        filesystem.get_file(url, str(target), callback=progress)
    except Exception as error:  # the errors of stores have no common base
        if isinstance(error, InputError) or (
            isinstance(error, OSError) and error.errno in _DISK_FAULTS
        ):
            raise
        if isinstance(error, FileNotFoundError):
            return "no such file", True
        status = getattr(error, "status", None)
        message = (
            f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
            if status
            else one_line(error)
        )
        refused = (
            isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
        )
        return message, refused or isinstance(error, PermissionError)
    size = target.stat().st_size
    return (
        None
        if progress.size
        in (
            None,
            size,
        )
        else f"ended after {size:,} of {progress.size:,} bytes"
    ), False


def _web(url: str) -> Any:
    aiohttp: Any = require("aiohttp", "train")

    async def redirected(_session: object, _context: object, parameters: Any) -> None:
        to = parameters.response.headers.get("Location", "")
        if parameters.url.scheme == "https" and to.lower().startswith("http:"):
            raise InputError(
                f"{url}: leads from https: to {to[:200]}, which is refused"
            )

    traces = aiohttp.TraceConfig()
    traces.on_request_redirect.append(redirected)
    options = {
        # aiohttp's limit of five minutes in all would end large shards.
        "timeout": aiohttp.ClientTimeout(
            total=None, sock_connect=30, sock_read=_SILENT_SECONDS
        ),
        "trust_env": True,  # proxies
        "trace_configs": [traces],
        # The bytes as they lie there, so that their number can be compared with what
        # was announced.
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
    }
    encoded = (
        re.fullmatch("[!-~]+", url) is not None
    )  # sent as it was typed, as signed addresses want it
    return fsspec.filesystem(
        "http", client_kwargs=options, encoded=encoded, skip_instance_cache=True
    )


class RemoteShardSource(FileSource[ShardSource]):
    """Samples in tars that commands or URLs give; more than the known number are left
    out, with one warning.
    """

    def __init__(
        self, name: str, counts: dict[str, int], cache: Cache, member: str | None
    ) -> None:
        super().__init__(name, tuple(counts.values()), streamed=True)
        self._urls, self._cache, self._member, self._warned = (
            tuple(counts),
            cache,
            member,
            False,
        )
        self.shard_names = tuple(
            map(shard_name, counts)
        )  # without what comes before them (a bucket, a token)

    def read(self, index: int) -> RawSample:
        """The pair at ``index``; InputError names a shard that cannot be fetched."""
        shard, row = self.place(index)
        source = self.opened(shard)
        if row < (complete := source.complete[0]):
            return source.read(row)
        cut = f": {source.cuts[0]}" if source.cuts else ""
        counts = f"holds {complete:,} samples, {SIZES} has {self.shard_sizes[shard]:,}"
        raise BadSample(
            "truncated shard",
            f"{self.shard_names[shard]}/{row}",
            f"{self._urls[shard]} {counts}{cut}",
        )

    def fingerprint(self) -> Fingerprint:
        shards = zip(self.shard_names, self.shard_sizes, strict=True)
        return {
            "samples": len(self),
            "shards": digest(f"{name} {n}" for name, n in shards),
        }

    def prepare(self, shard: int) -> Path:
        url = self._urls[shard]
        return self._cache.get("shards", url, lambda path: fetch(url, path))

    def load(self, shard: int, file: Path) -> ShardSource:
        url, listed = self._urls[shard], self.shard_sizes[shard]
        try:
            source = ShardSource(
                url, [file], self._cache, self.shard_names[shard], self._member
            )
            source.reader.read(0, 0, 0)  # stays open when the cache drops it
        except InputError as error:
            file.unlink()  # FileNotFoundError where the cache has dropped it
            raise InputError(
                f"{url}: gave no readable shard ({str(error).removeprefix(f'{file} ')})"
            ) from None
        odd = source.remark
        if (complete := source.complete[0]) > listed:
            odd = (
                f"holds {complete:,} samples, {SIZES} has {listed:,}: the others are"
                " left out"
            )
        if odd and not self._warned:
            logger.warning("%s: %s (reported once)", url, odd)
            self._warned = True
        return source


def open_remote(
    spec: str, cache: Cache, member: str | None = None
) -> RemoteShardSource:
    """Opens streamed shards, whose counts are remembered on this machine or lie next to
    the shards.
    """
    urls = expand(spec, escape=False)
    counts = _read_sizes(_memory(spec))
    listed: dict[str, dict[str, int]] = {}
    for url in urls if not counts.keys() >= {*urls} else ():
        # The same URL or command for another file in the shard's folder.
        *_, name = [None, *SHARD_NAME.finditer(url)]
        place = f"{url[: name.start()]}{SIZES}{url[name.end() :]}" if name else ""
        try:
            if place and place not in listed:
                with tempfile.TemporaryDirectory() as folder:
                    fetch(place, path := Path(folder) / SIZES)
                    listed[place] = _read_sizes(path, place)
            counts[url] = listed[place][shard_name(url)]
        except (InputError, KeyError) as error:
            why = (
                error
                if isinstance(error, InputError)
                else f"{place or url}: has no count for {shard_name(url)}"
            )
            raise InputError(
                f"{spec}: the number of samples in every shard must be known;"
                f" {why}{_HOW}"
            ) from None
    return RemoteShardSource(spec, {url: counts[url] for url in urls}, cache, member)


def _read_sizes(path: Path, where: str = "") -> dict[str, int]:
    """The counts in a file, none without it; ``where`` is what an error calls it."""
    try:
        counts = (
            json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
        )
    except (ValueError, RecursionError):
        counts = None
    if not isinstance(counts, dict) or not all(
        type(count) is int and count >= 0 for count in counts.values()
    ):
        raise InputError(f'{where or path}: is not {{"shard.tar": count, …}}')
    return counts


def _memory(pattern: str) -> Path:
    return (
        cache_root()
        / "sizes"
        / f"{hashlib.blake2b(pattern.encode(), digest_size=16).hexdigest()}.json"
    )


def write_counts(spec: str, out: Path | None) -> tuple[Path | None, dict[str, int]]:
    """Counts the samples of shards, remotely where it stopped; returns the list that
    was written, and the counts.
    """
    remote, folder = is_remote(spec), Path(local_path(spec))
    if remote:
        shards = expand(spec, escape=False)
    else:
        shards = [
            str(path)
            for path in (
                tars_in(folder) if folder.is_dir() else matching_files(str(folder))
            )
        ]
        out = folder / SIZES if out is None and folder.is_dir() else out
    files = [shard_name(shard) if remote else Path(shard).name for shard in shards]
    if (
        not shards
        or (out is None and not remote)
        or (out is not None and len({*files}) < len(files))
    ):
        raise InputError(
            f"{spec}: --out is missing, or names of shards come twice; count a folder"
            " of tars by itself"
        )
    sizes = _read_sizes(_memory(spec)) if remote else {}
    sizes = (
        {} if sizes.keys() >= {*shards} else sizes
    )  # a count that has ended is begun anew
    cut: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for shard in (shard for shard in shards if shard not in sizes):
            path = Path(temporary) / "shard.tar" if remote else Path(shard)
            if remote:
                fetch(shard, path)
            source = ShardSource(shard, [path])
            if source.remark:
                logger.warning(
                    "%s: %s", shard, source.remark.replace("read", "counted", 1)
                )
            cut += (f"{shard}: {why}" for why in source.cuts.values())
            sizes |= {} if source.cuts else {shard: len(source)}
            if remote:
                write_whole(_memory(spec), json.dumps(sizes))
    if cut:
        raise InputError("; ".join(cut))
    if out is not None:
        listed = {name: sizes[shard] for name, shard in zip(files, shards, strict=True)}
        write_whole(out, json.dumps(listed, indent=1) + "\n")
    return out, {shard: sizes[shard] for shard in shards}
