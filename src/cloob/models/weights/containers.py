"""Tensors out of files that anyone may have written: the unpickler knows a list of
exact names, and no code runs.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.models.importing import translated
from cloob.models.runs import check_objective

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # of transformers
_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
}


def folder_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of weights in a folder of transformers, and its tensors."""
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name, trained_file(folder / name)[0]
    raise InputError(f"{folder}: no weights in it ({' or '.join(WEIGHTS_FILES)})")


def trained_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of safetensors or a ``state_dict`` of torch; and the objective that
    our open_clip launcher wrote.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    file = read_torch(path)
    tensors = file.tensors
    objective: dict[str, Any] = {}
    with contextlib.suppress(KeyError, IndexError, TypeError):  # another program's
        stored = file.checkpoint["optimizer"]["param_groups"][0]["cloob"]
        objective = check_objective(stored, f"{path}: cloob")
    # of training by several processes
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensors[key] for key in tensors}
    return tensors, objective


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, copied, as the file may change. Each is copied from a map
    of its own: pages that stay mapped count as memory.
    """
    from safetensors import safe_open

    tensors = {}
    with translated(f"{path}: cannot be read as weights"):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, framework="pt") as file:
                tensors[name] = file.get_tensor(name).clone()
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors from where they lie, copies only of those that share memory;
    OSError where that cannot be done.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    here = {key: tensors[key].detach().cpu().contiguous() for key in tensors}
    try:
        save_file(_separate(here), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # of the system, which it hides
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    # the file begins as its owner's alone
    path.chmod(path.parent.stat().st_mode & 0o666)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copies of those that share memory with one before."""
    separate = {}
    shared: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in shared else tensor
        shared.add(memory)
    return separate


class TorchFile(NamedTuple):
    """What ``torch.save`` or TorchScript wrote."""

    tensors: dict[str, Tensor]
    checkpoint: dict[str, Any]  # around the tensors; empty without one
    is_script: bool


def read_torch(path: Path) -> TorchFile:
    """The tensors of a file of torch's, and the checkpoint around them."""
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not zipped and file.read(4) == b"PK\3\4":
            raise InputError(
                f"{path}: is cut short: it begins as a zip and lacks its end; get it"
                " again"
            )
    records = check_zip(path) if zipped else {}
    with translated(f"{path}: cannot be read as weights"):
        if "constants.pkl" in records:
            with zipfile.ZipFile(path) as archive:
                tensors = dict(_scripted(_Script(archive).load()))
            return TorchFile(tensors, {}, is_script=True)
        content = _load(path, records)
        has_more = isinstance(content, dict) and "state_dict" in content
        tensors = _checked(content["state_dict"] if has_more else content)
        return TorchFile(tensors, content if has_more else {}, is_script=False)


def _checked(state: object) -> dict[str, Tensor]:
    """The tensors of a ``state_dict``, none of which repeats its numbers."""
    if not isinstance(state, dict) or not all(
        isinstance(one, Tensor) for one in state.values()
    ):
        raise TypeError(
            "neither tensors by their names nor a checkpoint with a state_dict"
        )
    for name, tensor in state.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, and the file holds fewer"
                " numbers"
            )
    return _separate(state)


def _load(path: Path, records: Mapping[str, int]) -> Any:
    """What ``torch.save`` wrote; the records of a zip have to be as long as their
    storages, in torch's order.
    """
    numbers = itertools.count()

    def check(storage: Any, _: str) -> Any:
        size = records.get(record := f"data/{next(numbers)}", 0)
        if size != storage.nbytes():
            raise ValueError(
                f"record {record} has {size:,} bytes, its tensors take"
                f" {storage.nbytes():,}"
            )
        return storage

    return torch.load(path, map_location=check if records else "cpu", weights_only=True)


def check_zip(path: Path) -> dict[str, int]:
    """The bytes of every record of torch's zip, by its name without the folder;
    InputError for a damaged one.
    """
    with (
        translated(f"{path}: cannot be read as weights"),
        zipfile.ZipFile(path) as archive,
    ):
        infos = archive.infolist()
        tensors = [info for info in infos if "/data/" in info.filename]
        if len({info.filename for info in infos}) < len(infos):
            raise zipfile.BadZipFile("two records of one name")
        if any(info.compress_type != zipfile.ZIP_STORED for info in tensors):
            raise zipfile.BadZipFile(
                "its tensors are compressed, as torch writes no file; save it with"
                " torch.save"
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is not what was written")
        return {info.filename.partition("/")[2]: info.file_size for info in infos}


Stored = tuple[torch.UntypedStorage, torch.dtype]


class _Unpickler(pickle.Unpickler):
    """Knows the classes of ``names``, and makes any class that TorchScript generated a
    ``_Made``.
    """

    names: Mapping[tuple[str, str], object]

    def find_class(self, module: str, name: str) -> object:
        if module.partition(".")[0] == "__torch__":
            return _Made
        if (module, name) not in self.names:
            raise pickle.UnpicklingError(
                f"asks for {module}.{name}, which no file of weights needs"
            )
        return self.names[module, name]


class _Made:
    """An object of a pickle as its arguments and its state; no code runs."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _tensor(
    storage: Stored,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *_: object,
) -> Tensor:
    untyped, dtype = storage
    return torch.empty(0, dtype=dtype).set_(untyped, offset, shape, strides)


class _Script(_Unpickler):
    """Reads ``data.pkl`` of a TorchScript archive."""

    names = {
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch.jit._pickle", "build_intlist"): tuple,
        ("collections", "OrderedDict"): dict,
    } | {("torch", name): dtype for name, dtype in _STORAGES.items()}

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._folder = archive.namelist()[0].partition("/")[0]
        super().__init__(archive.open(f"{self._folder}/data.pkl"))

    def persistent_load(self, pid: tuple[object, torch.dtype, str]) -> Stored:
        _, dtype, key, *_ = pid
        content = bytearray(self._archive.read(f"{self._folder}/data/{key}"))
        return torch.frombuffer(content, dtype=torch.uint8).untyped_storage(), dtype


def _scripted(module: _Made, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in module.state.items():
        if isinstance(value, _Made):
            yield from _scripted(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


class _Arrays(_Unpickler):
    """Reads numpy's and jax's arrays: numpy itself would trust the file's dtypes."""

    names: Mapping[tuple[str, str], object] = {
        ("haiku._src.data_structures", "FlatMapping"): dict,
        ("jax._src.array", "_reconstruct_array"): _Made,
        ("numpy", "ndarray"): _Made,
        ("numpy", "dtype"): _Made,
        ("numpy.core.multiarray", "_reconstruct"): _Made,
        ("numpy._core.multiarray", "_reconstruct"): _Made,
        ("numpy.core.numeric", "_frombuffer"): _Made,
        ("numpy._core.numeric", "_frombuffer"): _Made,
        ("optax._src.base", "EmptyState"): _Made,
        ("optax._src.transform", "ScaleByAdamState"): _Made,
        ("optax._src.transform", "ScaleByScheduleState"): _Made,
        ("optax._src.wrappers", "MaskedState"): _Made,
    }


def read_arrays(path: Path) -> Any:
    """A pickle of plain values and numpy or jax arrays, which ``array`` makes tensors
    of.
    """
    with translated(f"{path}: cannot be read as weights"), path.open("rb") as file:
        return _Arrays(file).load()


def array(made: Any) -> Tensor:
    """An array that ``read_arrays`` gave, in the pickle's memory where the order of
    bytes is the machine's.
    """
    match made:
        case (
            _Made(state=(_, shape, dtype, fortran, data))
            | _Made(args=(_, _, (_, shape, dtype, fortran, data), _))
        ):
            pass  # numpy's state, which jax hands on
        case _:
            data, dtype, shape, fortran = made.args  # numpy 2 takes a buffer
    big = dtype.state is not None and dtype.state[1] == ">"
    flat = np.frombuffer(data, np.dtype(f"{'>' if big else '<'}{dtype.args[0]}"))
    shaped = flat.reshape(shape, order="F" if fortran in (True, "F") else "C")
    return torch.from_numpy(shaped.astype(shaped.dtype.newbyteorder("="), copy=False))
