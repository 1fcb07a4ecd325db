"""The Hugging Face hub: whether it answers, its cache alone where it does not, and configurations before all else."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from cloob.errors import InputError, require
from cloob.models.names import known_models, local_place
from cloob.models.runs import split_checkpoint
from cloob.models.untrusted import CONFIG_FILES, check_folder

_CLOSED: ContextVar[str | None] = ContextVar("closed", default=None)
_PATIENCE = 2.0  # seconds for a first answer
_OFFLINE = (
    "a model folder on this disk, a model that was fetched before, `cloob demo` and "
    "training from scratch need no network"
)


def answers(url: str) -> bool:
    """Whether there is anybody at an address, through the proxies that are set; within two seconds."""
    result: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PATIENCE):
                result.append(True)
        except urllib.error.HTTPError:
            result.append(True)  # an answer all the same
        except (OSError, ValueError):
            result.append(False)

    # A thread, as looking up a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return result == [True]


def check_fetchable(source: str) -> None:
    """Refuses a model that would have to be fetched where nothing was fetched before and nobody answers.

    Quick, and without importing torch; what is only partly there is found when it is loaded.

    Args:
        source: What ``load_model`` takes, or a frozen encoder's ``timm:NAME`` or ``hf:NAME``.

    Raises:
        InputError: It is no path, there is nothing of it in the hub's cache, and the hub cannot be asked.
    """
    text = split_checkpoint(source)[0]
    kind, _, name = text.rpartition(":")
    tag = not kind and name.rpartition("/")[0].replace("/", "-") in known_models()
    if local_place(source) or not (tag or kind in ("hf-hub", "hf", "timm", "timm:hf-hub")):
        return
    constants: Any = require("huggingface_hub.constants", "train")
    cache = Path(constants.HF_HUB_CACHE)
    fetched = f"models--{name.partition('@')[0].replace('/', '--')}" if "/" in name and not tag else "models--*"
    there = any(cache.glob(fetched)) or (tag and Path("~/.cache/clip").expanduser().is_dir())
    if not there and (constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT)):
        asked = constants.HF_HUB_OFFLINE
        raise not_there(source, "HF_HUB_OFFLINE is set" if asked else no_answer(constants.ENDPOINT))


@contextmanager
def closed_hub(reason: str) -> Iterator[None]:
    """Inside, models come from the hub's cache alone, and nobody is asked for anything.

    Args:
        reason: What the error says of a model that is not in the cache.
    """
    before = _CLOSED.set(reason)
    try:
        yield
    finally:
        _CLOSED.reset(before)


@contextmanager
def reachable_hub(source: str) -> Iterator[None]:
    """Lets the libraries inside fetch from the hub; where it is closed or does not answer, from its cache alone.

    Args:
        source: What is being loaded, for the error.

    Raises:
        InputError: What is not in the cache is needed, and the hub cannot be asked; the line says what works offline.
    """
    constants: Any = require("huggingface_hub.constants", "train")
    asked, closed = constants.HF_HUB_OFFLINE, _CLOSED.get()
    offline = asked or closed is not None or not answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = offline
    try:
        yield
    except Exception as error:
        if offline and _is_absence(error):
            if closed is not None:
                raise InputError(f"{source}: not on this machine, and {closed}") from error
            raise not_there(source, "HF_HUB_OFFLINE is set" if asked else no_answer(constants.ENDPOINT)) from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = asked


def no_answer(url: str) -> str:
    """The clause of an address at which nobody is."""
    return f"{url} does not answer"


def not_there(source: str, reason: str) -> InputError:
    """The error of what would have to be fetched and cannot be."""
    return InputError(f"{source}: not on this machine, and {reason}; {_OFFLINE}")


def check_hub_model(name: str, where: str, *more: str, revision: str | None = None) -> Path:
    """Fetches the configurations of a model on the hub, and refuses it where they ask for code.

    Args:
        name: ``owner/name``; a folder of that name, which transformers would take instead, is looked at likewise.
        where: What asks for it, for the error.
        more: Patterns of files to fetch with them, where it has them.
        revision: A branch, tag or commit of it; None: ``main``.

    Returns:
        The folder with the configurations.

    Raises:
        InputError: They ask for Python of their own or name files elsewhere, or cannot be had.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _snapshot(name, where, [*CONFIG_FILES, *more], revision)
    check_folder(folder)
    return folder


def fetch_first(name: str, where: str, choices: Sequence[Sequence[str]], revision: str | None = None) -> Path:
    """Fetches from a model on the hub the first of some sets of files that it has.

    Args:
        name: ``owner/name``, or a folder, which has them already.
        where: What asks for it, for the error.
        choices: Patterns of files, each set sufficient.
        revision: A branch, tag or commit of it; None: ``main``.

    Returns:
        The folder.

    Raises:
        InputError: It has none of them, or they cannot be had.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    for patterns in choices:
        folder = _snapshot(name, where, patterns, revision)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return folder
    raise InputError(f"{where}: no {' or '.join(patterns[0] for patterns in choices)} in it")


def _snapshot(name: str, where: str, patterns: Sequence[str], revision: str | None) -> Path:
    """The folder of a model on the hub, with those of its files that fit the patterns and lie in no sub-folder."""
    hub: Any = require("huggingface_hub", "train")
    with reachable_hub(where):
        offline = require("huggingface_hub.constants", "train").HF_HUB_OFFLINE
        some = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"], "local_files_only": offline}
        return Path(hub.snapshot_download(name, revision=revision, **some))


def _is_absence(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is of a file that is not in the cache."""
    errors: Any = require("huggingface_hub.errors", "train")
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
