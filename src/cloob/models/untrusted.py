"""Checks of a model folder of unknown origin: none of its Python runs, no path leaves the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cloob.errors import InputError, one_line

CONFIG_FILES = (
    *("config.json", "*_config.json", "*.index.json", "special_tokens_map.json"),
    *("objective.json", "towers.json", "aligned.json"),  # ours
)
"""Patterns of the files that may ask for code or name other files; fetched from a hub before all others."""

MAX_LAYERS = 1024  # of a tower; the largest that are published have 96
_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines"})
_KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")  # OWNER/NAME is a package of the hub
_FILE_KEYS = frozenset({"vocab_file", "merges_file", "tokenizer_file", "spm_file"})
_NAMES = ("hf_tokenizer_name", "hf_model_name")
_ARGUMENTS = ("clean", "strip_sep_token", "language", "reduction_mask")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TIMM_NAME = re.compile(r"\w[\w.-]*")


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds; InputError if it cannot be read or is not of a kind (``object`` for anything)."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
        reason = "" if isinstance(content, kind) else f"{kind.__name__} wanted, {type(content).__name__} found"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(getattr(error, "strerror", "") or one_line(error))
    if reason:
        raise InputError(f"{path}: not readable as JSON ({reason})")
    return content


def _walk(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Key (in a list the list's) and value of everything in a JSON value."""
    yield key, content
    if isinstance(content, dict | list):
        for inner, value in content.items() if isinstance(content, dict) else ((key, item) for item in content):
            yield from _walk(value, inner)


def check_folder(folder: Path) -> None:
    """Refuses a model folder of any program whose configurations ask for Python code, or name files elsewhere."""
    for path in sorted({path for pattern in CONFIG_FILES for path in folder.glob(pattern)}):
        content = read_json(path, object)
        for key, value in _walk(content):
            kernel, why = _KERNEL_KEYS.fullmatch(key) and "/" in str(value), ""
            if kernel or (key in _CODE_KEYS and value not in (None, False)):
                why = "asks for Python code of the model's own, which is never run"
            shard = path.name.endswith(".index.json") and key != "metadata"
            file = shard or (key in _FILE_KEYS and Path(str(value)).exists())
            if file and isinstance(value, str) and leaves(value):
                why = f"is {value!r}, a file outside of its folder"
            if why:
                raise InputError(f"{path}: {key} {why}")


def leaves(name: str) -> bool:
    """Whether a file's name may lead out of the folder that it is relative to, on any system."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or name.startswith("~") or bool(PureWindowsPath(name).drive)


def check_model_cfg(model_cfg: dict[str, Any], where: str) -> None:
    """Refuses an open_clip ``model_cfg`` with a path or address in place of a name, or foreign arguments."""
    check_layers(model_cfg, where)
    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    wrong = [f"text_cfg.tokenizer_kwargs.{key}" for key in text.get("tokenizer_kwargs") or () if key not in _ARGUMENTS]
    wrong += [f"text_cfg.{key}" for key in _NAMES if not _is_name(text.get(key), _HUB_NAME)]
    if not _is_name(vision.get("timm_model_name"), _TIMM_NAME):
        wrong.append("vision_cfg.timm_model_name")
    if wrong:
        right = "names of models alone, no path and no address, and open_clip's arguments are read from a configuration"
        raise InputError(f"{where}: {wrong[0]}: {right}")


def check_layers(config: Any, where: str) -> None:
    """Refuses a tower of so many layers that to build it, even without weights, would not end."""
    for key, value in _walk(config):
        if key.endswith("layers") and isinstance(value, int) and value > MAX_LAYERS:
            raise InputError(f"{where}: {key} is {value:,}; at most {MAX_LAYERS:,} are built")


def _is_name(name: object, pattern: re.Pattern[str]) -> bool:
    return not name or (isinstance(name, str) and bool(pattern.fullmatch(name)) and not leaves(name))
