"""safetensors files, each field of the header checked: the package itself lets a key pass that is there twice."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cloob.errors import InputError, require
from cloob.models.untrusted import LARGEST_JSON, parse_json
from cloob.models.weights.formats.pickles import printable
from cloob.models.weights.formats.stored import Stored, stored

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, still on the disk.

    Raises:
        InputError: The header is not one, or tensors and file do not cover each other byte for byte.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size - 8:
            raise InputError(f"{path}: cut short or damaged: a header of {length} bytes in a file of {size}")
        if length > LARGEST_JSON:
            raise InputError(f"{path}: {length:,} bytes are too many for a header")
        header = parse_json(path, file.read(length))
    start = 8 + length
    tensors: dict[str, Stored] = {}
    places: list[tuple[int, int]] = []
    for key, entry in header.items():
        if key == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise InputError(f"{path}: __metadata__ must hold strings alone")
            continue
        where = repr(printable(key))
        begin, end, dtype, shape = _fields(path, where, entry)
        tensor = stored(path, where, (start + begin, min(end, size - start) - begin), dtype, shape)
        if tensor.nbytes != end - begin:
            raise InputError(f"{path}: {where} of shape {shape} has {end - begin} bytes instead of {tensor.nbytes}")
        tensors[key] = tensor
        places.append((begin, end))
    free = 0
    for begin, end in sorted(places):
        if begin != free:
            raise InputError(f"{path}: its tensors overlap, or bytes between them belong to none")
        free = end
    if start + free != size:
        raise InputError(f"{path}: its tensors end at byte {start + free}, and the file has {size} (cut short?)")
    return tensors


def _fields(path: Path, where: str, entry: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    match entry:
        case {"dtype": str(name), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            numbers = [*shape, begin, end]
            if all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) and begin <= end:
                if name not in _DTYPES:
                    raise InputError(f"{path}: {where} has dtype {printable(name)!r}, which is not known")
                return begin, end, _DTYPES[name], tuple(shape)
    raise InputError(f"{path}: {where} is not described as safetensors asks")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a file straight from the tensors' memory; OSError where that cannot be done."""
    try:
        require("safetensors.torch", "train").save_file(dict(tensors), path, metadata={"format": "pt"})
    except require("safetensors", "train").SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # of the system, which it hides
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # the file begins as its owner's alone
