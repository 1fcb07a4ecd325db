"""What is fetched: models of the Hugging Face hub by its own library, and public files into our cache.

Of the hub the configurations come before all else; without a network what its cache has. A public file is there only
when it is whole and checked. Two processes that want the same one wait for each other.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloob.cache import cache_root, locked
from cloob.errors import InputError, require
from cloob.models.importing import CLOSED, translated
from cloob.models.source import PUBLIC, PublicFile
from cloob.models.untrusted import CONFIG_FILES, check_folder


@contextmanager
def closed_hub(reason: str) -> Iterator[None]:
    """Inside, models come from the hub's cache alone; ``reason``: what the error says of one that is not there."""
    before = CLOSED.set(reason)
    try:
        yield
    finally:
        CLOSED.reset(before)


def check_hub_model(name: str, where: str, *more: str, revision: str | None = None) -> Path:
    """The folder with the configurations of a model on the hub, and ``more`` files; refused where they ask for code."""
    folder = Path(name)
    if not folder.is_dir():  # which transformers would take
        folder = _snapshot(name, where, [*CONFIG_FILES, *more], revision)
    check_folder(folder)
    return folder


def fetch_first(name: str, where: str, choices: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a model on the hub, with the first of some patterns of files that it has."""
    folder = Path(name)
    for pattern in choices if not folder.is_dir() else ():
        folder = _snapshot(name, where, [pattern], revision)
        if any(folder.glob(pattern)):
            break
    return folder


def fetch_file(name: str, where: str, *files: str) -> Path:
    """The first of some files that a model on the hub has; open_clip and timm wait longer, and ask a closed hub."""
    folder = fetch_first(name, where, files)
    return next((folder / file for file in files if (folder / file).is_file()), folder / files[-1])


def _snapshot(name: str, where: str, patterns: Sequence[str], revision: str | None) -> Path:
    """The folder of a model on the hub, with those of its files that fit the patterns; in sub-folders only if asked."""
    hub: Any = require("huggingface_hub", "train")
    some = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"] if "/" not in "".join(patterns) else None}
    with translated(where):
        return Path(hub.snapshot_download(name, revision=revision, local_files_only=bool(CLOSED.get()), **some))


def fetch_model(name: str) -> Path:
    """The folder of a public model in the cache, or its file where the model is one; fetched if it is not there yet."""
    model, folder = PUBLIC[name], cache_root() / "weights" / name.replace("/", "--")
    paths = [fetch_public(file, folder) for file in model.files]
    return folder if len(paths) > 1 else paths[0]


def fetch_public(file: PublicFile, folder: Path) -> Path:
    """One file in a folder of the cache; InputError where it cannot be had or is not the published one."""
    target = folder / file.name
    if target.is_file():
        return target
    offline = [key for key in ("CLOOB_OFFLINE", "HF_HUB_OFFLINE") if os.environ.get(key, "0") not in ("", "0")]
    if offline:
        right = f"not in the cache, and {offline[0]} is set; fetch it elsewhere and put it at {target}"
        raise InputError(f"{file.url}: {right}")
    from cloob.data.shards.remote import fetch  # fsspec

    with translated(f"{file.url}: not fetched to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{file.name}.lock"):
            if not target.is_file():  # another process may have fetched it meanwhile
                part = target.with_name(f"{target.name}.part")
                if sys.stderr.isatty():
                    print(f"fetching {file.name} …", file=sys.stderr)
                try:
                    fetch(file.url, part)
                    with part.open("rb") as content:
                        digest = hashlib.file_digest(content, "sha256").hexdigest()
                    if file.sha256 not in (None, digest):
                        raise InputError(f"{file.url}: SHA-256 is {digest}, published is {file.sha256}")
                    part.replace(target)
                finally:
                    part.unlink(missing_ok=True)
    return target
