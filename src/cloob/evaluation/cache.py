"""Embeddings in the cache, found again by what the model's weights and the data's bytes are.

A file that cannot be read counts as absent and is written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cloob.cache import Cache
from cloob.data.content import add_part
from cloob.errors import InputError, require
from cloob.models.encoding import digest
from cloob.models.fingerprint import package_versions
from cloob.models.runs import ONNX_FILE

_VERSION = "4"  # of what is stored and how it is computed; a new number makes all files of the old one unused


class Stored(NamedTuple):
    """What one file holds.

    Attributes:
        tensors: By name.
        facts: JSON-able values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def load(cache: Cache, model: str, kind: str, data: str) -> Stored | None:
    """What is stored under the keys; None if nothing is, or it cannot be read."""
    path = cache.find("embeddings", _name(model, kind, data))
    if path is None:
        return None
    library = require("safetensors", "train")
    try:
        with library.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return Stored(tensors, json.loads((file.metadata() or {})["facts"]))
    except (library.SafetensorError, OSError, KeyError, ValueError):
        return None


def save(cache: Cache, model: str, kind: str, data: str, stored: Stored) -> Path:
    """Stores under the keys, whole or not at all; InputError where the cache cannot be written."""
    tensors = {name: value.contiguous() for name, value in stored.tensors.items()}
    facts = json.dumps(stored.facts)  # escaped: a key may come from a file name that is not UTF-8
    content = require("safetensors.torch", "train").save(tensors, metadata={"facts": facts})
    return cache.put("embeddings", _name(model, kind, data), content)


def _name(model: str, kind: str, data: str) -> str:
    return f"{model}/{kind}-{data}.safetensors"


def fingerprint(*parts: str) -> str:
    """A short name for a list of strings, equal for equal lists only."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        add_part(state, part.encode("utf-8", "surrogatepass"))
    return str(state.hexdigest())


def folder_key(folder: Path, device: str | torch.device) -> str:
    """The key of a model folder: the bytes of its files (weights, configuration, tokeniser), without loading it.

    Args:
        folder: A model folder, or a file of weights.
        device: Where it will run; kinds of devices round differently.

    Raises:
        InputError: A file cannot be read.
    """
    state = _model_state(device)
    if (folder / ONNX_FILE).is_file():
        add_part(state, *(part.encode() for part in package_versions(("onnxruntime",))))
    try:
        for path in [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file()):
            add_part(state, path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                add_part(state, hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    return str(state.hexdigest())


def module_key(module: nn.Module, facts: Mapping[str, Any], device: str | torch.device) -> str:
    """The key of a loaded model: its parameters and buffers, and what else decides over its embeddings.

    Args:
        module: The model.
        facts: JSON-able, such as the configuration of its towers.
        device: Where it runs.
    """
    return digest(module, _model_state(device).hexdigest(), facts)


def _model_state(device: str | torch.device) -> Any:
    state = hashlib.blake2b(digest_size=16)
    for part in (
        _VERSION,
        torch.device(device).type,
        *package_versions(("torch", "open_clip_torch", "timm", "pillow")),
    ):
        add_part(state, part.encode())
    return state
