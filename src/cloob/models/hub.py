"""The Hugging Face hub by its own library: configurations before all else; without a network from its cache."""

from __future__ import annotations

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

    A folder called ``name``, which transformers would take instead, is looked at likewise. ``where``: what asks for it.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _snapshot(name, where, [*CONFIG_FILES, *more], revision)
    check_folder(folder)
    return folder


def fetch_first(name: str, where: str, choices: Sequence[Sequence[str]], revision: str | None = None) -> Path:
    """Fetches from a model on the hub the first of some sets of files that it has; as ``check_hub_model``."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    for patterns in choices:
        folder = _snapshot(name, where, patterns, revision)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return folder
    raise InputError(f"{where}: no {' or '.join(patterns[0] for patterns in choices)} in it, or in its cache")


def fetch_file(name: str, where: str, *files: str) -> Path:
    """The first of some files that a model on the hub has; as ``check_hub_model``.

    The libraries' own downloads wait 23 seconds a file for a hub that cannot be reached, and this asks once.
    """
    folder = fetch_first(name, where, [[file] for file in files])
    return next(folder / file for file in files if (folder / file).is_file())


def _snapshot(name: str, where: str, patterns: Sequence[str], revision: str | None) -> Path:
    """The folder of a model on the hub, with those of its files that fit the patterns; in sub-folders only if asked."""
    hub: Any = require("huggingface_hub", "train")
    closed = _CLOSED.get()
    some = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"] if "/" not in "".join(patterns) else None}
    try:
        return Path(hub.snapshot_download(name, revision=revision, local_files_only=closed is not None, **some))
    except Exception as error:  # of many kinds, as of its network library
        if closed is not None:
            raise InputError(f"{where}: not on this machine, and {closed}") from error
        raise InputError(not_fetched(where, error) or f"{where}: {one_line(error)}") from error


def not_fetched(source: str, error: BaseException) -> str | None:
    """The line of an error, or of one that it came from, of the hub that cannot be asked; None of another one."""
    errors: Any = require("huggingface_hub.errors", "train")
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    constants: Any = require("huggingface_hub.constants", "train")
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    return (
        f"{source}: not on this machine, and {reason}; a model folder on this disk, a model that was fetched before, "
        "`cloob demo` and training from scratch need no network"
    )
