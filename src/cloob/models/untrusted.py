"""What a stranger's model folder may say: its files are data, none of its Python runs, no path leaves the folder.

Looked at before anything else of a model is read: by ``load_model`` and by whatever opens a tokenizer or an encoder.
"""

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

_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines"})
_KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")  # OWNER/NAME is a package of the hub
_FILE_KEYS = frozenset({"vocab_file", "merges_file", "tokenizer_file", "spm_file"})
_TOKENIZER_ARGUMENTS = ("clean", "strip_sep_token", "language", "reduction_mask")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TIMM_NAME = re.compile(r"\w[\w.-]*")


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds; InputError if it cannot be read or is not of a kind (``object`` for anything)."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else kind.__name__
        raise InputError(f"{path}: a JSON {wanted} wanted, {type(content).__name__} found")
    return content


def _walk(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Key (in a list the list's) and value of everything in a JSON value."""
    yield key, content
    if isinstance(content, dict | list):
        for inner, value in content.items() if isinstance(content, dict) else ((key, item) for item in content):
            yield from _walk(value, inner)


def check_folder(folder: Path) -> None:
    """Refuses a model folder of any program whose configurations ask for Python of its own, or name files elsewhere."""
    for path in sorted({path for pattern in CONFIG_FILES for path in folder.glob(pattern)}):
        content = read_json(path, object)
        for key, value in _walk(content):
            kernel = _KERNEL_KEYS.fullmatch(key) and "/" in str(value)
            if kernel or (key in _CODE_KEYS and value not in (None, False)):
                raise InputError(f"{path}: {key} asks for Python code of the model's own, which is never run")
            if key in _FILE_KEYS and isinstance(value, str) and leaves(value) and Path(value).exists():
                raise InputError(f"{path}: {key} is {value!r}, a file outside of its folder")
        if path.name.endswith(".index.json") and isinstance(content, dict):
            for _, value in _walk(content.get("weight_map")):
                if isinstance(value, str) and leaves(value):
                    raise InputError(f"{path}: names {value!r}, a file outside of its folder")


def leaves(name: str) -> bool:
    """Whether a file's name may lead out of the folder that it is relative to, on any system."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or name.startswith("~") or bool(PureWindowsPath(name).drive)


def check_model_cfg(model_cfg: dict[str, Any], where: str) -> None:
    """Refuses an open_clip ``model_cfg`` that asks for more than towers and a tokenizer.

    That is: an argument for the tokenizer that is not one of open_clip's own, or a path or another source in the place
    of a name (``hf_tokenizer_name``, ``hf_model_name``, ``timm_model_name``).
    """
    text, vision = model_cfg.get("text_cfg"), model_cfg.get("vision_cfg")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise InputError(f"{where}: text_cfg and vision_cfg have to be objects")
    arguments = text.get("tokenizer_kwargs") or {}
    known = isinstance(arguments, dict) and arguments.keys() <= set(_TOKENIZER_ARGUMENTS)
    if not known or not all(isinstance(value, str | bool) for value in arguments.values()):
        right = f"{', '.join(_TOKENIZER_ARGUMENTS)} alone may be there, each a word, true or false"
        raise InputError(f"{where}: text_cfg.tokenizer_kwargs is {arguments!r}; {right}")
    for key in ("hf_tokenizer_name", "hf_model_name"):
        _check_name(text.get(key), _HUB_NAME, "the name of a model on the hub", f"{where}: text_cfg.{key}")
    _check_name(vision.get("timm_model_name"), _TIMM_NAME, "a name of timm", f"{where}: vision_cfg.timm_model_name")


def _check_name(name: object, pattern: re.Pattern[str], wanted: str, where: str) -> None:
    if name and not (isinstance(name, str) and pattern.fullmatch(name) and not leaves(name)):
        raise InputError(f"{where} is {name!r}; {wanted} alone is read from a configuration, no path and no address")
