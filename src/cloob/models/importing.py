"""open_clip imported once, and errors of libraries as one line."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from cloob.errors import InputError, one_line, require
from cloob.models.source import CONFIGS

_ONE_AT_A_TIME = threading.RLock()
"""Threads that import open_clip together may be handed it half made."""
_NOTHING = logging.Filter("no logger")
CLOSED: ContextVar[str | None] = ContextVar("closed", default=None)
"""Why nothing is fetched from the hub, for :func:`cloob.models.hub.closed_hub`."""


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
    """Turns whatever a library raises into an InputError of one line that begins with ``what``; keeps it quiet.

    open_clip logs through the root logger's module functions, which would also install a handler there.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
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
        said = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise InputError(f"{what}: {_not_fetched(error) or said}") from error
    finally:
        root.removeFilter(_NOTHING)
        root.removeHandler(handler)


def _not_fetched(error: BaseException) -> str | None:
    """What to say of an error that comes from a hub which cannot be asked; None of another one."""
    errors: Any = sys.modules.get("huggingface_hub.errors")
    cause: BaseException | None = error if errors else None
    while cause is not None and not isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    if closed := CLOSED.get():
        return f"not on this machine, and {closed}"
    constants: Any = require("huggingface_hub.constants", "train")
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    others = "a model folder on this disk, a model that was fetched before, `cloob demo` and training from scratch"
    return f"not on this machine, and {reason}; {others} need no network"
