"""Bytes from elsewhere: ``pipe:COMMAND``, ``s3://``, ``gs://``, ``https://``, whatever WebDataset's opener knows."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cloob.errors import InputError, require

_SCHEME = re.compile(r"(pipe|file):|[A-Za-z][A-Za-z0-9+.-]+://")
_SHARD_NAME = re.compile(r"[^/\s'\"=]+\.(?:tar(?:\.gz|\.bz2|\.xz)?|tgz)(?=$|[\s'\"?#;|&)])", re.IGNORECASE)
_PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt
_CHUNK = 1 << 20


def is_remote(spec: str) -> bool:
    """Whether a spec is to be opened by a command or over a network, and not as a path."""
    return _SCHEME.match(spec) is not None and not spec.startswith("file:")


def local_path(spec: str) -> str:
    """``file:`` URLs as paths; anything else as it is."""
    return unquote(urlsplit(spec).path) if spec.startswith("file:") else spec


def expand(pattern: str, *, escape: bool = True) -> list[str]:
    """The strings that a brace pattern stands for, in order.

    Args:
        pattern: With ``{000..999}`` or ``{a,b}`` in it, or without.
        escape: Whether a backslash makes a brace literal; in a command it is the shell's.

    Raises:
        InputError: The braces do not close.
    """
    try:
        return list(require("braceexpand", "train").braceexpand(pattern, escape=escape))
    except ValueError as error:
        raise InputError(f"{pattern}: not a brace pattern: {error}") from None


def shard_name(url: str) -> str:
    """The file name of the shard that a URL or a command fetches: the last word in it that ends like a tar."""
    found = _SHARD_NAME.findall(url)
    return str(found[-1]) if found else re.split(r"[/\s]", url.rstrip("/ -"))[-1][-80:] or url[-80:]


def sibling(url: str, name: str) -> str | None:
    """The same URL or command for another file in the shard's folder; None when no shard name is found in it."""
    found = list(_SHARD_NAME.finditer(url))
    return f"{url[: found[-1].start()]}{name}{url[found[-1].end() :]}" if found else None


def fetch(url: str, target: Path) -> None:
    """Writes what a URL gives into a file; tries three times.

    Args:
        url: ``pipe:COMMAND`` or ``scheme://…``.
        target: The file; it is replaced.

    Raises:
        InputError: It could not be opened, or its command failed; the message names the exit status.
        OSError: The file cannot be written.
    """
    wrong = None
    for attempt in range(len(_PAUSES) + 1):
        if attempt:
            time.sleep(_PAUSES[attempt - 1])
        with target.open("wb") as file:
            wrong = _copy(url, file)
        if wrong is None:
            return
    raise InputError(f"{url}: {wrong} ({len(_PAUSES) + 1} attempts)")


def fetch_json(url: str) -> Any:
    """What a URL gives, read as JSON.

    Raises:
        InputError: As ``fetch``, or it is not JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fetched.json"
        fetch(url, path)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{url}: is not JSON ({error})") from None


def _copy(url: str, file: Any) -> str | None:
    """Copies a stream; returns what went wrong with its source."""
    try:
        stream = _open(url)
    except OSError as error:
        return f"cannot be opened ({error.strerror or error})"
    process = getattr(stream, "proc", None)
    wrong: str | None = None
    try:
        while True:
            try:
                chunk = stream.read(_CHUNK)
            except OSError as error:  # WebDataset's pipe raises this when its command has failed
                wrong = f"cannot be read ({error.strerror or error})"
                break
            if not chunk:
                break
            file.write(chunk)
    finally:
        with contextlib.suppress(OSError):
            stream.close()
    if process is None:
        return wrong
    # WebDataset takes a broken pipe inside the command for success; a whole shard is wanted here.
    status = process.wait()
    hint = " (command not found)" if status == 127 else ""
    return f"its command ended with exit status {status}{hint}" if status else None


def _open(url: str) -> Any:
    gopen = require("webdataset.gopen", "train")  # the package has a function of this name, which hides the module
    url = gopen.rewrite_url(url)
    scheme = url.partition(":")[0]
    if scheme == "s3" and "s3" not in gopen.gopen_schemes:  # WebDataset leaves S3 to commands
        url = f"pipe:aws s3 cp {shlex.quote(url)} - --only-show-errors"
    elif "://" in url and scheme != "pipe" and scheme != "file" and scheme not in gopen.gopen_schemes:
        known = ", ".join(sorted({*gopen.gopen_schemes, "s3"} - {"__default__"}))
        raise InputError(f"{url}: nothing here opens {scheme}://; known: {known}; any command works as pipe:COMMAND")
    return gopen.gopen(url)
