"""What a stranger's model folder may say: its files are data, none of its Python runs, no path leaves the folder.

Looked at before anything else of a model is read: by ``load_model`` and by whoever opens a tokeniser or an encoder.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from cloob.errors import InputError, one_line
from cloob.files import TooLarge, read_at_most

CONFIG_FILES = (
    *("config.json", "*_config.json", "*.index.json", "special_tokens_map.json"),
    *("objective.json", "towers.json", "aligned.json"),  # ours
)
"""Patterns of the files that may ask for code or name other files; fetched from a hub before all others."""

_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines"})
_KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")  # OWNER/NAME is a package of the hub
_FILE_KEYS = frozenset({"vocab_file", "merges_file", "tokenizer_file", "spm_file"})
_TOKENIZER_ARGUMENTS = ("clean", "strip_sep_token", "language", "reduction_mask")
LARGEST_JSON = 16 << 20
"""Bytes of a configuration or of a header; an index of shards has some megabytes."""
MOST_LAYERS = 1024
"""No model has more blocks one after the other; each takes time and memory before any weight is looked at."""
_LAYERS = re.compile(
    r"(.*_)?(n_)?(layers?|depths?|blocks?|stages?|groups?)|(num|n)_(hidden_)?(layers?|blocks?|groups?)"
)
_LARGEST_SIZE = 1 << 24
_MOST_DIGITS = 300  # of a whole number: a float holds all that have no more
_DEEPEST = 100  # objects and lists inside each other
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TIMM_NAME = re.compile(r"\w[\w.-]*")


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file of unknown origin holds.

    Args:
        path: The file.
        kind: What it has to be: ``dict``, ``list``, or ``object`` for anything.

    Raises:
        InputError: It cannot be read, or as :func:`parse_json`.
    """
    try:
        return parse_json(path, read_at_most(path, LARGEST_JSON), kind)
    except TooLarge as error:
        raise InputError(f"{path}: {error.size:,} bytes are too many for a configuration") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_json(path: Path, text: bytes, kind: type = dict) -> Any:
    """The value of JSON of unknown origin.

    Args:
        path: Where it stands, for errors.
        text: UTF-8.
        kind: As in :func:`read_json`.

    Raises:
        InputError: It is no JSON, or of another kind; it has a key twice, NaN, an infinity or a number that no float
            holds, or is nested more than 100 deep.
    """
    try:
        content = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_no_key_twice,
            parse_constant=_no_number,
            parse_int=_whole,
            parse_float=_finite,
        )
    except RecursionError:
        raise InputError(f"{path}: nested too deeply for a configuration") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if _is_deep(content):
        raise InputError(f"{path}: nested too deeply for a configuration")
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else kind.__name__
        raise InputError(f"{path}: a JSON {wanted} wanted, {type(content).__name__} found")
    return content


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"{digits[:20]}… is a number of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is beyond every floating-point number")
    return number


def _is_deep(content: Any) -> bool:
    """Whether anything lies deeper than ``_DEEPEST``; numbers and words are passed over at once, as there are many."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(_DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for values in inner for item in values if isinstance(item, dict | list)]
    return any(level)


def _walk(content: Any) -> Iterator[tuple[int, str, Any]]:
    """Depth, key (in a list the list's) and value of everything in a JSON value, without recursion."""
    waiting: list[tuple[int, str, Any]] = [(0, "", content)]
    while waiting:
        depth, key, value = waiting.pop()
        yield depth, key, value
        if isinstance(value, dict):
            waiting += [(depth + 1, str(inner), item) for inner, item in value.items()]
        elif isinstance(value, list):
            waiting += [(depth + 1, key, item) for item in value]


def check_folder(folder: Path) -> None:
    """Refuses a folder whose configuration files ask for Python of its own or too many layers, or name files elsewhere.

    Args:
        folder: Of open_clip, transformers, sentence-transformers or timm.

    Raises:
        InputError: One does, or cannot be read.
    """
    for path in sorted({path for pattern in CONFIG_FILES for path in folder.glob(pattern)}):
        content = read_json(path, object)
        for _, key, value in _walk(content):
            if type(value) is int and value > MOST_LAYERS and _LAYERS.fullmatch(key):
                raise InputError(f"{path}: {key} is {value:.6g}; no model has more than {MOST_LAYERS}")
            kernel = _KERNEL_KEYS.fullmatch(key) and "/" in str(value)
            if kernel or (key in _CODE_KEYS and value not in (None, False)):
                raise InputError(f"{path}: {key} asks for Python code of the model's own, which is never run")
            if key in _FILE_KEYS and isinstance(value, str) and leaves(value) and Path(value).exists():
                raise InputError(f"{path}: {key} is {value!r}, a file outside of its folder")
        if path.name.endswith(".index.json") and isinstance(content, dict):
            for _, _, value in _walk(content.get("weight_map")):
                if isinstance(value, str) and leaves(value):
                    raise InputError(f"{path}: names {value!r}, a file outside of its folder")


def leaves(name: str) -> bool:
    """Whether a file's name may lead out of the folder that it is relative to, on any system."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or name.startswith("~") or bool(PureWindowsPath(name).drive)


def check_model_cfg(model_cfg: dict[str, Any], where: str) -> None:
    """Refuses an open_clip ``model_cfg`` that asks for more than towers and a tokeniser, or for sizes that none has.

    Args:
        model_cfg: With ``text_cfg`` and ``vision_cfg``.
        where: The file that says so.

    Raises:
        InputError: A part is no object, a number is beyond 2^24 or none, the tokeniser gets an argument that is not
            one of open_clip's own, or a name (``hf_tokenizer_name``, ``hf_model_name``, ``timm_model_name``) is a path
            or another source.
    """
    for _, key, value in _walk(model_cfg):
        if isinstance(value, int | float) and not abs(value) <= _LARGEST_SIZE:
            raise InputError(f"{where}: {key} is {value:.6g}, which is no size of a model")
        if type(value) is int and value > MOST_LAYERS and _LAYERS.fullmatch(key):
            raise InputError(f"{where}: {key} is {value:.6g}; no model has more than {MOST_LAYERS}")
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg.get(part), dict):
            raise InputError(f"{where}: {part} is a {type(model_cfg.get(part)).__name__}; an object is wanted")
    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    arguments = text.get("tokenizer_kwargs") or {}
    if not isinstance(arguments, dict):
        raise InputError(f"{where}: text_cfg.tokenizer_kwargs is a {type(arguments).__name__}; an object is wanted")
    for key, value in arguments.items():
        if key not in _TOKENIZER_ARGUMENTS:
            known = ", ".join(_TOKENIZER_ARGUMENTS)
            raise InputError(f"{where}: text_cfg.tokenizer_kwargs has {key!r}; {known} alone may be there")
        if not isinstance(value, str | bool):
            raise InputError(f"{where}: text_cfg.tokenizer_kwargs.{key} is {value!r}; a word, true or false wanted")
    for part, key in (("text_cfg", "hf_tokenizer_name"), ("text_cfg", "hf_model_name")):
        _check_name(text.get(key), _HUB_NAME, "the name of a model on the hub", f"{where}: {part}.{key}")
    _check_name(vision.get("timm_model_name"), _TIMM_NAME, "a name of timm", f"{where}: vision_cfg.timm_model_name")


def _check_name(name: object, pattern: re.Pattern[str], wanted: str, where: str) -> None:
    if name and not (isinstance(name, str) and pattern.fullmatch(name) and not leaves(name)):
        raise InputError(f"{where} is {name!r}; {wanted} alone is read from a configuration, no path and no address")
