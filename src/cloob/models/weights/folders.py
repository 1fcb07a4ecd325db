"""The weights of a folder: one file of safetensors or of torch, or several with an index."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cloob.errors import InputError, printable
from cloob.models.untrusted import leaves, read_json
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
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    file = read_torch(path)
    value = file.value
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):  # open_clip's training
        value = value["state_dict"]
    return file.tensors(value, "the file")


def _indexed(index: Path) -> dict[str, Tensor]:
    """The tensors of several files, each key in the file that the index says and in no other.

    Raises:
        InputError: The index and the files contradict each other, or a file is not one beside the index.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: weight_map, from each key to its file, is wanted")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        path = index.parent / name
        if leaves(name) or path.name != name or path.suffix not in (".safetensors", ".bin"):
            raise InputError(f"{index}: names {printable(name)!r}; a file of weights beside it is wanted")
        if not path.is_file():
            raise InputError(f"{index}: names {printable(name)!r}, which is not there")
        part = file_tensors(path)
        strangers = part.keys() ^ {key for key, place in places.items() if place == name}
        if strangers:
            raise InputError(f"{path}: {printable(min(strangers))} is in it or in {index.name}, but not in both")
        tensors |= part
    return tensors
