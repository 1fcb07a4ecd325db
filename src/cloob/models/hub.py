"""The Hugging Face hub by its own library: configurations before all else; without a network from its cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from cloob.errors import InputError, one_line, require
from cloob.models.untrusted import CONFIG_FILES, check_folder

_CLOSED: ContextVar[str | None] = ContextVar("closed", default=None)


@contextmanager
def closed_hub(reason: str) -> Iterator[None]:
    """Inside, models come from the hub's cache alone; ``reason``: what the error says of one that is not there."""
    before = _CLOSED.set(reason)
    try:
        yield
    finally:
        _CLOSED.reset(before)


def check_hub_model(name: str, where: str, *more: str, revision: str | None = None) -> Path:
    """The folder with the configurations of a model on the hub, and ``more`` files; refused where they ask for code.

    A folder called ``name`` is looked at likewise: transformers would take it. ``where``: what asks for the model.
    """
    folder = Path(name)
    if not folder.is_dir():
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
    closed = _CLOSED.get()
    some = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"] if "/" not in "".join(patterns) else None}
    try:
        return Path(hub.snapshot_download(name, revision=revision, local_files_only=closed is not None, **some))
    except Exception as error:  # of many kinds, as of its network library
        reason = f"not on this machine, and {closed}" if closed else not_fetched(error) or one_line(error)
        raise InputError(f"{where}: {reason}") from error


def not_fetched(error: BaseException) -> str | None:
    """What to say of an error that comes from a hub which cannot be asked; None of another one."""
    errors: Any = sys.modules.get("huggingface_hub.errors")
    cause: BaseException | None = error if errors else None
    while cause is not None and not isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    constants: Any = require("huggingface_hub.constants", "train")
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    others = "a model folder on this disk, a model that was fetched before, `cloob demo` and training from scratch"
    return f"not on this machine, and {reason}; {others} need no network"
