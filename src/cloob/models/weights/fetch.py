"""Public files into the cache: resumed where they broke off, checked, and there only when they are whole.

Two processes that want the same file wait for each other. With ``CLOOB_OFFLINE=1`` or ``HF_HUB_OFFLINE=1`` nothing is
fetched.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from cloob.cache import cache_root, locked
from cloob.errors import InputError
from cloob.models.weights.registry import PublicFile, PublicModel

Progress = Callable[[str, int, int | None], None]
_PAUSES = (0.5, 2.0, 5.0, 10.0)
_BLOCK = 1 << 20
_TIMEOUT = 30.0
_LARGEST = 20 << 30  # no public checkpoint of these families has a tenth of it
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class _BrokenOff(Exception):  # noqa: N818 (an event that is tried again, no error of its own)
    """The connection ended before the file did."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but none from https to plain http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"redirected to {newurl.partition(':')[0]}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_model(name: str, model: PublicModel, progress: Progress | None = None) -> Path:
    """The files of a public model in the cache, fetched where they are not there yet.

    Args:
        name: Its name.
        model: Its files.
        progress: Called with a file's name, bytes so far and in all (None: unknown).

    Returns:
        The folder, or the file where the model is one.

    Raises:
        InputError: As ``fetch_file``.
    """
    folder = cache_root() / "weights" / name.replace("/", "--")
    paths = [fetch_file(file, folder, progress) for file in model.files]
    return folder if model.folder else paths[0]


def fetch_file(file: PublicFile, folder: Path, progress: Progress | None = None) -> Path:
    """One file in the cache.

    Args:
        file: The file.
        folder: Where it goes; made.
        progress: As ``fetch_model``.

    Raises:
        InputError: Offline, not reachable, another size or hash than published, or no room.
    """
    target = folder / file.name
    if target.is_file():
        return target
    offline = next(
        (key for key in ("CLOOB_OFFLINE", "HF_HUB_OFFLINE") if os.environ.get(key, "0") not in ("", "0")), None
    )
    if offline:
        raise InputError(
            f"{file.url}: not in the cache, and {offline} is set; fetch it elsewhere and put it at {target}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = _part(target)
        with locked(folder / f".{file.name}.lock", forever=True):
            if not target.is_file():  # another process may have fetched it meanwhile
                _fetch(file, target, progress)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def show_progress(name: str, done: int, total: int | None) -> None:
    """A line on a terminal that says how far a file is."""
    if sys.stderr.isatty():
        part = f"of {total / 1e6:.0f} MB" if total else "MB"
        print(f"\r{name}: {done / 1e6:.0f} {part}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _fetch(file: PublicFile, target: Path, progress: Progress | None) -> None:
    part = _part(target)
    for pause in (*_PAUSES, None):
        try:
            _continue(file, part, progress)
            break
        except _BrokenOff as error:
            if pause is None:
                raise InputError(
                    f"{file.url}: broke off again and again ({error}); a later try goes on from there"
                ) from None
            time.sleep(pause)
    _check(file, part)
    _tag(part).unlink(missing_ok=True)
    part.replace(target)


def _part(target: Path) -> Path:
    """Where a file grows until it is whole."""
    return target.with_name(f"{target.name}.part")


def _continue(file: PublicFile, part: Path, progress: Progress | None) -> None:
    """Fetches what is missing of a file."""
    have = part.stat().st_size if part.is_file() else 0
    tag = _tag(part).read_text() if _tag(part).is_file() else None
    if have and file.sha256 is None and tag is None:  # nothing could say whether it is the same file
        have = 0
    headers = {"User-Agent": "cloob", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag is not None:
            headers["If-Range"] = tag
    opener = urllib.request.build_opener(_SafeRedirects)
    try:
        with opener.open(urllib.request.Request(file.url, headers=headers), timeout=_TIMEOUT) as answer:
            start, total = _extent(file, answer, have)
            _remember(part, answer.headers.get("ETag"))
            with part.open("r+b" if start else "wb") as out:
                out.seek(start)
                out.truncate()
                _copy(file, answer, out, start, total, progress)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # what is there is as long as the file, or longer
            if file.sha256 is not None and _digest(part) == file.sha256:
                return
            part.unlink()
            raise _BrokenOff("what was there did not fit") from None
        if error.code in (429, 500, 502, 503, 504):
            raise _BrokenOff(f"HTTP {error.code}") from None
        raise InputError(f"{file.url}: HTTP {error.code} ({error.reason})") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError | ConnectionResetError):
            raise _BrokenOff("no answer") from None
        raise InputError(f"{file.url}: not reachable ({error.reason})") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _BrokenOff(type(error).__name__) from None


def _extent(file: PublicFile, answer: Any, have: int) -> tuple[int, int | None]:
    """From which byte on the answer holds the file, and how long that is; None where the server does not say."""
    start, total = 0, None
    if answer.status == 206:
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != have:
            raise InputError(f"{file.url}: the server sends another part of the file than was asked for")
        start, total = have, int(match[2])
    elif (length := answer.headers.get("Content-Length")) is not None and length.isdigit():
        total = int(length)
    if file.size is not None and total not in (None, file.size):
        raise InputError(f"{file.url}: the server says {total} bytes, published are {file.size}")
    if total is not None and total > _LARGEST:
        raise InputError(f"{file.url}: the server says {total} bytes, more than any of these files has")
    return start, total


def _copy(
    file: PublicFile, answer: Any, out: BinaryIO, start: int, total: int | None, progress: Progress | None
) -> None:
    done = start
    if total is not None and total - start > shutil.disk_usage(Path(out.name).parent).free:
        raise InputError(f"{out.name}: {total - start} bytes are needed, and the disk has less")
    while block := answer.read(_BLOCK):
        done += len(block)
        if done > (total or _LARGEST):
            raise InputError(f"{file.url}: the server sends more than it said")
        out.write(block)
        if progress is not None:
            progress(file.name, done, total)
    if total is not None and done < total:
        raise _BrokenOff(f"{done} of {total} bytes")


def _check(file: PublicFile, part: Path) -> None:
    """Holds a fetched file against what is published of it; what is wrong is removed."""
    size = part.stat().st_size
    wrong = None
    if file.size is not None and size != file.size:
        wrong = f"{size} bytes came, published are {file.size}"
    elif file.sha256 is not None and (digest := _digest(part)) != file.sha256:
        wrong = f"SHA-256 is {digest}, published is {file.sha256}"
    if wrong is not None:
        part.unlink()
        _tag(part).unlink(missing_ok=True)
        raise InputError(f"{file.url}: {wrong}; nothing was kept")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _remember(part: Path, tag: str | None) -> None:
    """Keeps the server's mark of this version of the file; a weak one says too little."""
    if tag is not None and not tag.startswith("W/") and tag.isprintable() and len(tag) < 256:
        _tag(part).write_text(tag)
    else:
        _tag(part).unlink(missing_ok=True)
