"""open_clip imported once, errors of libraries as one line, and what is fetched: of the hub configurations first."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from cloob.cache import cache_root, locked
from cloob.errors import InputError, one_line, require
from cloob.models.source import CONFIGS, PUBLIC, PublicFile
from cloob.models.untrusted import CONFIG_FILES, check_folder

_ONE_AT_A_TIME = threading.RLock()  # threads that import open_clip together may get it half made
_NOTHING = logging.Filter("no logger")
_CLOSED: ContextVar[str | None] = ContextVar("closed", default=None)  # why nothing is fetched from the hub


def import_open_clip(part: str = "") -> ModuleType:
    """open_clip, or a module of it (``".transform"``, for instance); InputError if it is not installed."""
    with _ONE_AT_A_TIME:
        collects = gc.isenabled()
        gc.disable()  # looking for cycles in what is imported takes 0.3 s
        try:
            return require(f"open_clip{part}", "train")
        finally:
            if collects:
                gc.enable()


@functools.cache
def open_clip() -> ModuleType:
    """The open_clip module with our configurations registered; imported on the first call, which takes seconds."""
    module = import_open_clip()
    module.add_model_config(CONFIGS)
    return module


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns whatever a library raises into an InputError of one line that begins with ``what``; keeps it quiet."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # else open_clip, which logs by the root logger, would install one
    root.addFilter(_NOTHING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except BaseException as error:  # hub, pickle, JSON and shape errors have no common class
        of_rust = type(error).__module__ == "pyo3_runtime"  # a panic, which is no Exception
        if isinstance(error, InputError) or not (isinstance(error, Exception) or of_rust):
            raise
        message = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise InputError(f"{what}: {_not_fetched(error) or message}") from error
    finally:
        root.removeFilter(_NOTHING)
        root.removeHandler(handler)


def _not_fetched(error: BaseException) -> str | None:
    """The message for an error that comes from a hub which does not answer; None for another one."""
    errors: Any = sys.modules.get("huggingface_hub.errors")
    cause: BaseException | None = error if errors else None
    while cause is not None and not isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    if closed := _CLOSED.get():
        return f"not on this machine, and {closed}"
    constants: Any = require("huggingface_hub.constants", "train")
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    others = "a model folder on this disk, a model that was fetched before, `cloob demo` and training from scratch"
    return f"not on this machine, and {reason}; {others} need no network"


@contextlib.contextmanager
def closed_hub(reason: str) -> Iterator[None]:
    """Inside, models come from the hub's cache alone; ``reason`` is in the error for one that is missing."""
    before = _CLOSED.set(reason)
    try:
        yield
    finally:
        _CLOSED.reset(before)


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
    """A hub model's folder with the files that fit the patterns; sub-folders only for patterns with a slash."""
    hub: Any = require("huggingface_hub", "train")
    some = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"] if "/" not in "".join(patterns) else None}
    with translated(where):
        return Path(hub.snapshot_download(name, revision=revision, local_files_only=bool(_CLOSED.get()), **some))


def fetch_model(name: str) -> Path:
    """The folder of a public model in the cache, or its file where the model is one; fetched if it is not there yet."""
    model, folder = PUBLIC[name], cache_root() / "weights" / name.replace("/", "--")
    paths = [fetch_public(PublicFile(**file), folder) for file in model["files"]]
    return folder if len(paths) > 1 else paths[0]


def fetch_public(file: PublicFile, folder: Path) -> Path:
    """One file in a folder of the cache, complete and checked; processes that need the same one wait for each other."""
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
