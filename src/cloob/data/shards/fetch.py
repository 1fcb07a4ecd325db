"""Bytes from elsewhere: ``pipe:COMMAND`` that the user typed, and ``https://``, ``s3://``, ``gs://`` by fsspec.

No URL reaches a shell, and no command comes out of a list (``cloob.data.shards.sizes``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import fsspec
from fsspec.callbacks import Callback

from cloob.errors import InputError, message, require

_PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt
_CHUNK = 1 << 20
_NEEDS = {
    "http": ("aiohttp", "train"),
    "https": ("aiohttp", "train"),
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
}
_CONNECT_SECONDS = 30.0
_SILENT_SECONDS = 60.0  # that a server may say nothing
_STALL_SECONDS = 300.0  # in which less than this many bytes arrive: such a fetch would not end in any useful time
_STALL_BYTES = 64 * 1024
_STANDSTILL = "fewer than {:,} bytes came in {:g} s"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # of the disk here, not of the source


def fetch(url: str, target: Path, *, max_bytes: int | None = None) -> None:
    """Writes what a URL gives into a file; tries three times, unless the source says that there is nothing to get.

    Args:
        url: ``pipe:COMMAND`` or ``scheme://…``.
        target: The file; it is replaced.
        max_bytes: More than this is refused.

    Raises:
        InputError: It could not be opened, its command failed, it ended early, stood still or is too large.
        OSError: The file cannot be written.
    """
    wrong = None
    for attempt in range(len(_PAUSES) + 1):
        if attempt:
            time.sleep(_PAUSES[attempt - 1])
        target.write_bytes(b"")
        progress = _Progress(url, max_bytes)
        if url.startswith("pipe:"):
            wrong = _run(url.removeprefix("pipe:"), target, progress)
        else:
            wrong = _download(url, target, progress)
        if wrong is None:
            return
    raise InputError(f"{url}: {wrong} ({len(_PAUSES) + 1} attempts)")


class _Progress(Callback):  # type: ignore[misc] # fsspec is not typed
    """Counts what arrives, and ends a transfer that is too large or all but stands still."""

    def __init__(self, url: str, max_bytes: int | None) -> None:
        super().__init__()
        self._url = url
        self._max_bytes = max_bytes
        self._since, self._before = time.monotonic(), 0
        self.given_up = False

    def set_size(self, size: int | None) -> None:
        super().set_size(size)
        self._check(size or 0)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._check(self.value)
        if time.monotonic() - self._since > _STALL_SECONDS and self.stalled():
            self.given_up = True
            raise TimeoutError

    def stalled(self) -> bool:
        """Whether next to nothing has arrived since this was last asked."""
        arrived = self.value - self._before
        self._since, self._before = time.monotonic(), self.value
        return bool(arrived < _STALL_BYTES)

    def _check(self, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise InputError(f"{self._url}: more than {self._max_bytes:,} bytes, too much for what it should be")


def _run(command: str, target: Path, progress: _Progress) -> str | None:
    """Copies what a command prints; returns what went wrong with it."""
    done, stalled = threading.Event(), threading.Event()
    # A group of its own: what the shell has started ends with it.
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None

    def watch() -> None:
        while not done.wait(_STALL_SECONDS):
            if progress.stalled():
                stalled.set()
                _kill(process)
                return

    watcher = threading.Thread(target=watch, name="cloob-watch", daemon=True)
    watcher.start()
    try:
        with process.stdout, target.open("wb") as file:
            while chunk := os.read(process.stdout.fileno(), _CHUNK):
                file.write(chunk)
                progress.relative_update(len(chunk))
        status = process.wait()  # with its output closed; the watcher ends one that lives on
    except TimeoutError:
        return _STANDSTILL.format(_STALL_BYTES, _STALL_SECONDS)
    finally:
        done.set()
        watcher.join()
        if process.poll() is None:
            _kill(process)
            process.wait()
    if stalled.is_set():
        return _STANDSTILL.format(_STALL_BYTES, _STALL_SECONDS)
    hint = " (command not found)" if status == 127 else ""
    return f"its command ended with exit status {status}{hint}" if status else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _download(url: str, target: Path, progress: _Progress) -> str | None:
    """Copies a file by fsspec; returns what went wrong with its source, where trying again may help.

    Raises:
        InputError: The scheme is not known, or the source says that the file is not there or not for us.
    """
    filesystem = _filesystem(url)
    try:
        filesystem.get_file(url, str(target), callback=progress)
    except InputError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else message(error)
        raise InputError(f"{url}: {said}") from None
    except Exception as error:  # each kind of store has errors of its own, with no common base
        if isinstance(error, OSError) and error.errno in _FULL:
            raise
        status = getattr(error, "status", None)
        said = f"HTTP {status} {getattr(error, 'message', '')}".rstrip() if status else _named(error)
        if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
            raise InputError(f"{url}: {said}") from None
        return _STANDSTILL.format(_STALL_BYTES, _STALL_SECONDS) if progress.given_up else said
    size = target.stat().st_size
    if progress.size is not None and size != progress.size:
        return f"ended after {size:,} of {progress.size:,} bytes"
    return None


def _named(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {_SILENT_SECONDS:g} s"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _filesystem(url: str) -> Any:
    scheme = url.partition("://")[0].lower()
    if scheme in _NEEDS:
        require(*_NEEDS[scheme])
    if scheme in ("http", "https"):
        return _web(url)
    try:
        # By scheme alone: a whole URL would also be taken for a chain of file systems (``zip::…``).
        return fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{url}: nothing here opens {scheme}:// ({error}); any command works as pipe:COMMAND"
        ) from None


def _web(url: str) -> Any:
    aiohttp: Any = require("aiohttp", "train")

    async def redirected(_session: object, _context: object, parameters: Any) -> None:
        before = str(parameters.url)
        after = urljoin(before, parameters.response.headers.get("Location", ""))
        schemes = urlsplit(before).scheme, urlsplit(after).scheme
        if schemes not in (("http", "http"), ("http", "https"), ("https", "https")):
            raise InputError(f"{url}: leads from {schemes[0]}: to {schemes[1]}: ({after[:200]}), which is refused")

    traces = aiohttp.TraceConfig()
    traces.on_request_redirect.append(redirected)
    options = {
        "timeout": aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS),
        "trust_env": True,  # proxies
        "trace_configs": [traces],
        # The bytes as they lie there, so that their number can be compared with what was announced.
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
    }
    encoded = re.fullmatch("[!-~]+", url) is not None  # sent as it was typed, as signed addresses want it
    return fsspec.filesystem("http", client_kwargs=options, encoded=encoded, skip_instance_cache=True)
