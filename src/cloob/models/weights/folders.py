"""The weights of a folder: one file of safetensors or of torch."""

from __future__ import annotations

from pathlib import Path

from cloob.errors import InputError
from cloob.models.weights.formats.safe_tensors import read_safetensors
from cloob.models.weights.formats.stored import Stored
from cloob.models.weights.formats.torchfile import read_torch

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"


def folder_weights(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """The file of weights of a folder, and its tensors.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    for name in _WEIGHTS:
        if (folder / f"{name}{_INDEX}").exists():
            raise InputError(f"{folder / name}{_INDEX}: weights in several files are not read; save them in one")
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name, file_tensors(folder / name)
    raise InputError(f"{folder}: no {' or '.join(_WEIGHTS)} in it")


def file_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, or of a ``state_dict`` that torch wrote.

    Raises:
        InputError: It is neither.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    file = read_torch(path)
    value = file.value
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):  # open_clip's training
        value = value["state_dict"]
    return file.tensors(value, "the file")
