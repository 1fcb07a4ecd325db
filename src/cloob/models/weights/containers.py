"""Tensors out of files that anyone may have written: the unpickler knows a list of
exact names, and no code runs.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import io
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


def folder_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of weights in a folder of transformers, and its tensors."""
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name, trained_file(folder / name)[0]
    raise InputError(f"{folder}: no weights in it ({' or '.join(WEIGHTS_FILES)})")


def trained_file(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of safetensors or a ``state_dict`` of torch; and the objective that
    our open_clip launcher wrote.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    file = read_torch(path)
    objective: dict[str, object] = {}
    with contextlib.suppress(KeyError, IndexError, TypeError):  # another program's
        stored = file.checkpoint["optimizer"]["param_groups"][0]["cloob"]
        objective = check_objective(stored, f"{path}: cloob")
    return file.weights, objective


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

    on_cpu = {key: tensors[key].detach().cpu().contiguous() for key in tensors}
    try:
        save_file(_separate(on_cpu), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The system's error stands in its text alone.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    # safetensors gives nobody but the owner a right to read the file.
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

    @property
    def keys(self) -> dict[str, str]:
        """The tensors' keys by the names of weights: training over several GPUs puts
        ``module.`` in front of these.
        """
        return {key.removeprefix("module."): key for key in self.tensors}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors by the names of weights."""
        return {name: self.tensors[key] for name, key in self.keys.items()}


def read_torch(path: Path) -> TorchFile:
    """The tensors of a file of torch's, and the checkpoint around them."""
    with translated(f"{path}: cannot be read as weights"):
        content = _load(path)
        is_script = isinstance(content, _Inert)
        state = dict(_scripted(content)) if is_script else content
        checkpoint = {}
        if isinstance(state, dict) and "state_dict" in state:
            checkpoint, state = state, state["state_dict"]
        return TorchFile(_checked(state), checkpoint, is_script)


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
    if not is_zip:  # of torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True)
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path}: is cut short: it begins as a zip and lacks its end; get it again"
        )
    with zipfile.ZipFile(path) as archive:
        return _TorchZip(archive).load()


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


def check_zip(path: Path) -> None:
    """Raises InputError where a zip is not as it was written."""
    with translated(f"{path}: is damaged"), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is not what was written")


Stored = tuple[torch.UntypedStorage, torch.dtype]


class _Inert:
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


def _parameter(tensor: Tensor, *_: object) -> Tensor:
    return tensor


_INERT_NAMES = (
    *("numpy.ndarray", "numpy.dtype"),  # numpy itself would trust the file's dtypes
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
    "jax._src.array._reconstruct_array",
    "optax._src.base.EmptyState",
    "optax._src.transform.ScaleByAdamState",
    "optax._src.transform.ScaleByScheduleState",
    "optax._src.wrappers.MaskedState",
)
_KNOWN_NAMES: dict[str, object] = {
    **dict.fromkeys(_INERT_NAMES, _Inert),
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": collections.Counter,  # of torch's schedules
    "haiku._src.data_structures.FlatMapping": dict,
    "torch.Size": tuple,
    "torch.jit._pickle.build_intlist": tuple,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class _Unpickler(pickle.Unpickler):
    """Knows ``_KNOWN_NAMES`` alone, and makes any class that TorchScript generated a
    ``_Inert``.
    """

    def find_class(self, module: str, name: str) -> object:
        if module.partition(".")[0] == "__torch__":
            return _Inert
        full_name = f"{module}.{name}"
        if full_name not in _KNOWN_NAMES:
            raise pickle.UnpicklingError(
                f"asks for {full_name}, which no file of weights needs"
            )
        return _KNOWN_NAMES[full_name]


class _TorchZip(_Unpickler):
    """Reads ``data.pkl`` of a zip by ``torch.save`` or TorchScript."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        names = archive.namelist()
        folder = names[0].partition("/")[0]
        is_one_folder = all(name.startswith(f"{folder}/") for name in names)
        if len({*names}) < len(names) or not is_one_folder:
            raise zipfile.BadZipFile("two records of one name, or one elsewhere")
        self._archive = archive
        self._folder = folder
        self._storages: dict[str, torch.UntypedStorage] = {}
        super().__init__(io.BytesIO(archive.read(self._record("data.pkl"))))

    def persistent_load(self, pid: tuple[object, torch.dtype, str, str, int]) -> Stored:
        _, dtype, key, _, size = pid
        if key not in self._storages:
            record = self._record(f"data/{key}")
            if record.file_size != size * dtype.itemsize:
                raise ValueError(
                    f"record data/{key} has {record.file_size:,} bytes, its tensors"
                    f" take {size * dtype.itemsize:,}"
                )
            flat = torch.empty(record.file_size, dtype=torch.uint8)
            with self._archive.open(record) as file:  # which looks at its checksum
                file.readinto(flat.numpy())  # type: ignore[attr-defined]
            self._storages[key] = flat.untyped_storage()
        return self._storages[key], dtype

    def _record(self, name: str) -> zipfile.ZipInfo:
        record = self._archive.NameToInfo[f"{self._folder}/{name}"]
        if record.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(
                "its tensors are compressed, as torch writes no file; save it with"
                " torch.save"
            )
        return record


def _scripted(module: _Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in module.state.items():
        if isinstance(value, _Inert):
            yield from _scripted(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def read_arrays(path: Path) -> Any:
    """A pickle of plain values and numpy or jax arrays, which ``array`` makes tensors
    of.
    """
    with translated(f"{path}: cannot be read as weights"), path.open("rb") as file:
        return _Unpickler(file).load()


def array(made: Any) -> Tensor:
    """An array that ``read_arrays`` gave, in the pickle's memory where the order of
    bytes is the machine's.
    """
    match made:
        case (
            _Inert(state=(_, shape, dtype, fortran, data))
            | _Inert(args=(_, _, (_, shape, dtype, fortran, data), _))
        ):
            pass  # numpy's state, which jax hands on
        case _:
            data, dtype, shape, fortran = made.args  # numpy 2 takes a buffer
    big = dtype.state is not None and dtype.state[1] == ">"
    flat = np.frombuffer(data, np.dtype(f"{'>' if big else '<'}{dtype.args[0]}"))
    shaped = flat.reshape(shape, order="F" if fortran in (True, "F") else "C")
    return torch.from_numpy(shaped.astype(shaped.dtype.newbyteorder("="), copy=False))
