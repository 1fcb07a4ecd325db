"""The weights of a folder: one file of safetensors or of torch, or several with an index."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.errors import InputError, printable
from cloob.models.runs import check_objective
from cloob.models.untrusted import read_json
from cloob.models.weights.containers import read_safetensors, read_torch

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"


def folder_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder's file of weights, or the index of several, and its tensors; InputError where none can be read."""
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name, file_tensors(folder / name)
        if (folder / f"{name}{INDEX}").is_file():
            return folder / f"{name}{INDEX}", _indexed(folder / f"{name}{INDEX}")
    raise InputError(f"{folder}: no {' or '.join(WEIGHTS_FILES)} in it")


def file_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a ``state_dict`` that torch wrote; InputError if it is neither."""
    return trained_file(path)[0]


def trained_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As ``file_tensors``, and the objective of training that ``cloob.interop.open_clip`` wrote; else empty."""
    objective: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
    else:
        file = read_torch(path)
        value = file.value
        if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):  # open_clip's training
            with contextlib.suppress(KeyError, IndexError, TypeError):  # of other programs
                objective = check_objective(value["optimizer"]["param_groups"][0]["cloob"], f"{path}: cloob")
            value = value["state_dict"]
        tensors = file.tensors(value, "the file")
    prefix = "module."  # of training by several processes
    if all(key.startswith(prefix) for key in tensors):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors, objective


def _indexed(index: Path) -> dict[str, Tensor]:
    """The tensors of several files beside their index; InputError where the two contradict each other."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: weight_map, from each key to its file, is wanted")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        path = index.parent / name
        if path.name != name or path.suffix not in (".safetensors", ".bin") or not path.is_file():
            raise InputError(f"{index}: names {printable(name)!r}; a file of weights beside it is wanted")
        part = file_tensors(path)
        strangers = part.keys() ^ {key for key, place in places.items() if place == name}
        if strangers:
            raise InputError(f"{path}: {printable(min(strangers))} is in it or in {index.name}, but not in both")
        tensors |= part
    return tensors
