"""Public files into the cache: continued where they broke off, checked, and there only when they are whole.

Two processes that want the same file wait for each other. With ``CLOOB_OFFLINE=1`` or ``HF_HUB_OFFLINE=1`` nothing is
fetched.
"""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from cloob.cache import cache_root, locked
from cloob.errors import InputError
from cloob.models.importing import translated
from cloob.models.source import PUBLIC, PublicFile

_BLOCK = 1 << 20
_TIMEOUT = 30.0


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise InputError(f"{req.full_url}: redirected to {newurl.partition(':')[0]}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_model(name: str) -> Path:
    """The folder of a public model in the cache, or its file where the model is one; fetched if it is not there yet."""
    model, folder = PUBLIC[name], cache_root() / "weights" / name.replace("/", "--")
    paths = [fetch_file(file, folder) for file in model.files]
    return folder if model.folder else paths[0]


def fetch_file(file: PublicFile, folder: Path) -> Path:
    """One file in a folder of the cache; InputError where it cannot be had or is not the published one."""
    target = folder / file.name
    if target.is_file():
        return target
    offline = [key for key in ("CLOOB_OFFLINE", "HF_HUB_OFFLINE") if os.environ.get(key, "0") not in ("", "0")]
    if offline:
        right = f"not in the cache, and {offline[0]} is set; fetch it elsewhere and put it at {target}"
        raise InputError(f"{file.url}: {right}")
    with translated(f"{file.url}: not fetched to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{file.name}.lock"):
            if not target.is_file():  # another process may have fetched it meanwhile
                part = target.with_name(f"{target.name}.part")
                try:
                    _continue(file, part)
                except urllib.error.HTTPError as error:
                    error.close()
                    raise
                part.replace(target)
    return target


def _continue(file: PublicFile, part: Path) -> None:
    """Fetches what is missing of a file, and checks it; all of one without a hash, which may be another by now."""
    done = part.stat().st_size if part.is_file() and file.sha256 is not None else 0
    headers = {"User-Agent": "cloob", "Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    opener = urllib.request.build_opener(_SafeRedirects)
    with opener.open(urllib.request.Request(file.url, headers=headers), timeout=_TIMEOUT) as answer:
        done = done if answer.status == 206 else 0
        total = done + int(answer.headers.get("Content-Length", 0))
        with part.open("ab" if done else "wb") as out:
            while block := answer.read(_BLOCK):
                done += out.write(block)
                if sys.stderr.isatty():
                    end = "\n" if done == total else ""
                    print(f"\r{file.name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", end=end, file=sys.stderr)
    wrong = f"broke off after {done:,} of {total:,} bytes; another try goes on from there" if done < total else ""
    with part.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if not wrong and file.sha256 not in (None, digest):
        part.unlink()
        wrong = f"SHA-256 is {digest}, published is {file.sha256}; nothing was kept"
    if wrong:
        raise InputError(f"{file.url}: {wrong}")
