"""Public files into the cache: resumed where they broke off, checked, and there only when they are whole.

Two processes that want the same file wait for each other. With ``CLOOB_OFFLINE=1`` or ``HF_HUB_OFFLINE=1`` nothing is
fetched.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloob.cache import cache_root, locked
from cloob.errors import InputError
from cloob.models.registry import PublicFile, PublicModel

Progress = Callable[[str, int, int | None], None]
_PAUSES = (0.5, 2.0, 5.0, 10.0)
_BLOCK = 1 << 20
_TIMEOUT = 30.0


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but none from https to plain http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise InputError(f"{req.full_url}: redirected to {newurl.partition(':')[0]}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_model(name: str, model: PublicModel, progress: Progress | None = None) -> Path:
    """The folder of a public model in the cache, or its file where the model is one; fetched if it is not there yet.

    ``progress`` is called with a file's name, bytes so far and in all (None: unknown).
    """
    folder = cache_root() / "weights" / name.replace("/", "--")
    paths = [fetch_file(file, folder, progress) for file in model.files]
    return folder if model.folder else paths[0]


def fetch_file(file: PublicFile, folder: Path, progress: Progress | None = None) -> Path:
    """One file in a folder of the cache; InputError where it cannot be had or is not the published one."""
    target = folder / file.name
    if target.is_file():
        return target
    offline = [key for key in ("CLOOB_OFFLINE", "HF_HUB_OFFLINE") if os.environ.get(key, "0") not in ("", "0")]
    if offline:
        raise InputError(
            f"{file.url}: not in the cache, and {offline[0]} is set; fetch it elsewhere and put it at {target}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{file.name}.lock", forever=True):
            if not target.is_file():  # another process may have fetched it meanwhile
                part = target.with_name(f"{target.name}.part")
                _fetch(file, part, progress)
                _check(file, part)
                part.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def show_progress(name: str, done: int, total: int | None) -> None:
    """A line on a terminal that says how far a file is."""
    if sys.stderr.isatty():
        part = f"of {total / 1e6:.0f} MB" if total else "MB"
        print(f"\r{name}: {done / 1e6:.0f} {part}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _fetch(file: PublicFile, part: Path, progress: Progress | None) -> None:
    """Fetches what is missing of a file, in several attempts."""
    for pause in (*_PAUSES, None):
        reason = _continue(file, part, progress)
        if reason is None:
            return
        if pause is not None:
            time.sleep(pause)
    raise InputError(f"{file.url}: broke off again and again ({reason}); a later try goes on from there")


def _continue(file: PublicFile, part: Path, progress: Progress | None) -> str | None:
    """One attempt; returns why it broke off, None when the file is complete."""
    # Without a hash nothing could say whether the server still has the same file: that one begins anew.
    have = part.stat().st_size if part.is_file() and file.sha256 is not None else 0
    headers = {"User-Agent": "cloob", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        opener = urllib.request.build_opener(_SafeRedirects)
        with opener.open(urllib.request.Request(file.url, headers=headers), timeout=_TIMEOUT) as answer:
            done = have if answer.status == 206 else 0
            length = answer.headers.get("Content-Length", "")
            total = done + int(length) if length.isdigit() else None
            with part.open("r+b" if done else "wb") as out:
                out.seek(done)
                while block := answer.read(_BLOCK):
                    out.write(block)
                    done += len(block)
                    if progress is not None:
                        progress(file.name, done, total)
        return None if total is None or done >= total else f"{done} of {total} bytes"
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # the whole file is there already, or another one: the hash says it
            return None
        if error.code in (429, 500, 502, 503, 504):
            return f"HTTP {error.code}"
        raise InputError(f"{file.url}: HTTP {error.code} ({error.reason})") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError | ConnectionResetError):
            return "no answer"
        raise InputError(f"{file.url}: not reachable ({error.reason})") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        return type(error).__name__


def _check(file: PublicFile, part: Path) -> None:
    """Compares a fetched file with the published hash; another file is removed."""
    if file.sha256 is None:
        return
    with part.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != file.sha256:
        part.unlink()
        raise InputError(f"{file.url}: SHA-256 is {digest}, published is {file.sha256}; nothing was kept")
