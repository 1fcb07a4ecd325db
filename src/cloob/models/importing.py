"""open_clip imported once, errors of libraries as one line, and files of unknown
origin: none of their Python runs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any

from cloob.errors import InputError, one_line, require
from cloob.models.settings import ModelConfig

CONFIGS = Path(__file__).parent / "configs"
CONFIG_FILES = (
    *("config.json", "*_config.json", "*.index.json", "special_tokens_map.json"),
    *("objective.json", "towers.json", "aligned.json"),  # ours
)
"""Patterns of the files that may ask for code or name other files; fetched from a hub
before all others.
"""

MAX_LAYERS = 1024  # of a tower; the largest that are published have 96
_CODE_KEYS = frozenset(
    {"auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines"}
)
# OWNER/NAME is a package of the hub
_KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_FILE_KEYS = frozenset({"vocab_file", "merges_file", "tokenizer_file", "spm_file"})
_TOKENIZER_ARGUMENTS = {"clean", "strip_sep_token", "language", "reduction_mask"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TIMM_NAME = re.compile(r"\w[\w.-]*")

# threads that import open_clip together may get it half made
_ONE_AT_A_TIME = threading.RLock()
_DROP_ALL = logging.Filter("no logger")  # a name that no record has
# why nothing is fetched from the hub
_CLOSED: ContextVar[str | None] = ContextVar("closed", default=None)


def import_open_clip(part: str = "") -> ModuleType:
    """open_clip, or a module of it (``".transform"``, for instance); InputError if it
    is not installed.
    """
    with _ONE_AT_A_TIME:
        return require(f"open_clip{part}", "train")


@functools.cache
def open_clip() -> ModuleType:
    """The open_clip module with our configurations registered; imported on the first
    call, which takes seconds.
    """
    module = import_open_clip()
    module.add_model_config(CONFIGS)
    return module


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns whatever a library raises into an InputError of one line that begins with
    ``what``; keeps it quiet.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    # else open_clip, which logs by the root logger, would install one
    root.addHandler(handler)
    root.addFilter(_DROP_ALL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except BaseException as error:  # of hub, pickle, JSON and shapes, and Rust's panics
        is_panic = type(error).__module__ == "pyo3_runtime"
        if isinstance(error, InputError) or not (
            isinstance(error, Exception) or is_panic
        ):
            raise
        raise InputError(f"{what}: {_reason(error)}") from error
    finally:
        root.removeFilter(_DROP_ALL)
        root.removeHandler(handler)


def _reason(error: BaseException) -> str:
    """What a library's error means, on one line."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    errors: Any = sys.modules.get("huggingface_hub.errors")
    cause: BaseException | None = error if errors is not None else None
    while cause is not None:
        if isinstance(
            cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled
        ):
            return f"not on this machine, and {_CLOSED.get() or _why_no_hub()}"
        cause = cause.__cause__ or cause.__context__
    return one_line(error)


def _why_no_hub() -> str:
    constants = require("huggingface_hub.constants", "train")
    reason = f"{constants.ENDPOINT} does not answer"
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    return f"{reason}; a model folder on this disk needs no network"


@contextlib.contextmanager
def closed_hub(reason: str) -> Iterator[None]:
    """Inside, models come from the hub's cache alone; ``reason`` is in the error for
    one that is missing.
    """
    before = _CLOSED.set(reason)
    try:
        yield
    finally:
        _CLOSED.reset(before)


def check_hub_model(name: str, where: str, *files: str) -> Path:
    """The folder with the configurations of a model on the hub, and other files of it;
    refused where they ask for code.
    """
    folder = fetch_first(name, where, [[*CONFIG_FILES, *files]])
    check_folder(folder)
    return folder


def fetch_first(name: str, where: str, choices: Sequence[str | list[str]]) -> Path:
    """The folder of a model on the hub, with the first of some patterns (or lists of
    them) of files that it has.

    Sub-folders count only for patterns with a slash.
    """
    folder = Path(name)
    if folder.is_dir():  # which transformers would take
        return folder
    hub = require("huggingface_hub", "train")
    for choice in choices:
        patterns = [choice] if isinstance(choice, str) else choice
        with translated(where):
            fetched = hub.snapshot_download(
                name,
                local_files_only=bool(_CLOSED.get()),
                allow_patterns=patterns,
                ignore_patterns=None if "/" in "".join(patterns) else ["*/*"],
            )
        folder = Path(fetched)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            break
    return folder


def fetch_file(name: str, where: str, *files: str) -> Path:
    """The first of some files that a model on the hub has; open_clip and timm wait
    longer, and ask a closed hub.
    """
    folder = fetch_first(name, where, files)
    present = (folder / file for file in files if (folder / file).is_file())
    return next(present, folder / files[-1])


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds; InputError if it cannot be read or is not of a kind
    (``object`` for anything).
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{path}: not readable as JSON ({reason})") from error
    if not isinstance(content, kind):
        found = type(content).__name__
        raise InputError(
            f"{path}: not readable as JSON ({found} instead of {kind.__name__})"
        )
    return content


def _walk(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Key (in a list the list's) and value of everything in a JSON value."""
    yield key, content
    if isinstance(content, dict):
        for inner, value in content.items():
            yield from _walk(value, inner)
    elif isinstance(content, list):
        for value in content:
            yield from _walk(value, key)


def check_folder(folder: Path) -> None:
    """Refuses a model folder of any program whose configurations ask for Python code,
    or name files elsewhere.
    """
    files = {path for pattern in CONFIG_FILES for path in folder.glob(pattern)}
    for path in sorted(files):
        for key, value in _walk(read_json(path, object)):
            if why := _why_unsafe(path, key, value):
                raise InputError(f"{path}: {key} {why}")


def _why_unsafe(path: Path, key: str, value: object) -> str:
    """Why an entry of a configuration file is refused; empty if it is not."""
    names_shard = path.name.endswith(".index.json") and key != "metadata"
    names_file = key in _FILE_KEYS and Path(str(value)).exists()
    if (names_shard or names_file) and isinstance(value, str) and leads_outside(value):
        return f"is {value!r}, a file outside of its folder"
    names_kernel = _KERNEL_KEYS.fullmatch(key) is not None and "/" in str(value)
    if names_kernel or (key in _CODE_KEYS and value not in (None, False)):
        return "asks for Python code, which is never run"
    return ""


def leads_outside(name: str) -> bool:
    """Whether a file's name may lead out of the folder that it is relative to, on any
    system.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    return (
        path.is_absolute()
        or ".." in path.parts
        or name.startswith("~")
        or bool(PureWindowsPath(name).drive)
    )


def check_model_cfg(model_cfg: ModelConfig, where: str) -> None:
    """Refuses an open_clip ``model_cfg`` with a path or address in place of a name, or
    foreign arguments.
    """
    check_layers(model_cfg, where)
    text = model_cfg["text_cfg"]
    vision = model_cfg["vision_cfg"]
    names = {
        "text_cfg.hf_tokenizer_name": (text.get("hf_tokenizer_name"), _HUB_NAME),
        "text_cfg.hf_model_name": (text.get("hf_model_name"), _HUB_NAME),
        "vision_cfg.timm_model_name": (vision.get("timm_model_name"), _TIMM_NAME),
    }
    foreign = (text.get("tokenizer_kwargs") or {}).keys() - _TOKENIZER_ARGUMENTS
    refused = [f"text_cfg.tokenizer_kwargs.{key}" for key in sorted(foreign)]
    for key, (name, pattern) in names.items():
        if name and not pattern.fullmatch(str(name)):
            refused.append(key)
    if refused:
        raise InputError(
            f"{where}: {refused[0]}: names of models alone, no path and no address, and"
            " open_clip's arguments are read from a configuration"
        )


def check_layers(config: Any, where: str) -> None:
    """Refuses a tower of so many layers that to build it, even without weights, would
    not end.
    """
    for key, value in _walk(config):
        if key.endswith("layers") and isinstance(value, int) and value > MAX_LAYERS:
            raise InputError(
                f"{where}: {key} is {value:,}; at most {MAX_LAYERS:,} are built"
            )
