"""Bytes from elsewhere: ``pipe:COMMAND`` that the user typed, and ``https://``, ``s3://``, ``gs://`` by fsspec.

No URL reaches a shell, and no command comes out of a list (``cloob.data.shards.spec``).
"""

from __future__ import annotations

import errno
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from cloob.errors import InputError, one_line, require

_PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt
_NEEDS = {"http": ("aiohttp", "train"), "https": ("aiohttp", "train"), "s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
_SILENT_SECONDS = 60.0  # that a server may say nothing
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # here, not at the source


def fetch(url: str, target: Path) -> None:
    """Writes what a URL gives into a file; tries three times, unless the source says that there is nothing to get.

    InputError where nothing or not all can be had, OSError where the file cannot be written.
    """
    for pause in (0.0, *_PAUSES):
        time.sleep(pause)
        get = _run if url.startswith("pipe:") else _download
        if (wrong := get(url, target)) is None:
            return
    raise InputError(f"{url}: {wrong} ({len(_PAUSES) + 1} attempts)")


def _run(url: str, target: Path) -> str | None:
    """Writes what a command prints; returns what went wrong with it."""
    with target.open("wb") as file:
        status = subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=file, check=False).returncode
    hint = " (command not found)" if status == 127 else ""
    return f"its command ended with exit status {status}{hint}" if status else None


def _download(url: str, target: Path) -> str | None:
    """Copies a file by fsspec; returns what went wrong where trying again may help, raises InputError elsewhere."""
    progress = Callback()
    filesystem = _filesystem(url)
    try:
        filesystem.get_file(url, str(target), callback=progress)
    except InputError:
        raise
    except Exception as error:  # each kind of store has errors of its own, with no common base
        if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
            raise
        status = getattr(error, "status", None)
        said = f"HTTP {status} {getattr(error, 'message', '')}".rstrip() if status else one_line(error)
        refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
        if refused or isinstance(error, PermissionError | FileNotFoundError):
            said = "no such file" if isinstance(error, FileNotFoundError) else said
            raise InputError(f"{url}: {said}") from None
        return said
    size = target.stat().st_size
    return None if progress.size in (None, size) else f"ended after {size:,} of {progress.size:,} bytes"


def _filesystem(url: str) -> Any:
    scheme = url.partition("://")[0].lower()
    if scheme in _NEEDS:
        require(*_NEEDS[scheme])
    if scheme in ("http", "https"):
        return _web(url)
    try:
        # By scheme alone: a complete URL would also be taken for a chain of file systems (``zip::…``).
        return fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        raise InputError(f"{url}: nothing here opens {scheme}:// ({error}); any command does as pipe:COMMAND") from None


def _web(url: str) -> Any:
    aiohttp: Any = require("aiohttp", "train")

    async def redirected(_session: object, _context: object, parameters: Any) -> None:
        to = parameters.response.headers.get("Location", "")
        if parameters.url.scheme == "https" and to.lower().startswith("http:"):
            raise InputError(f"{url}: leads from https: to {to[:200]}, which is refused")

    traces = aiohttp.TraceConfig()
    traces.on_request_redirect.append(redirected)
    options = {
        # aiohttp's own limit of five minutes in all would end large shards.
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_SILENT_SECONDS),
        "trust_env": True,  # proxies
        "trace_configs": [traces],
        # The bytes as they lie there, so that their number can be compared with what was announced.
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
    }
    encoded = re.fullmatch("[!-~]+", url) is not None  # sent as it was typed, as signed addresses want it
    return fsspec.filesystem("http", client_kwargs=options, encoded=encoded, skip_instance_cache=True)
