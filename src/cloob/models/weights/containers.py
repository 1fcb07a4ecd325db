"""Tensors out of files that anyone may have written. Libraries read the containers, and none of them runs code.

safetensors and ``torch.load(weights_only=True)`` read their own files. Two kinds are left, pickles of numpy and jax
arrays and TorchScript archives: Python's unpickler reads those, with a list of exact names.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cloob.errors import InputError, is_failure, one_line, printable

T = TypeVar("T")
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}
_NUMBERS = ("f2", "f4", "f8", "i4", "i8")


@dataclass
class TorchFile:
    """What a file of torch holds: plain values, and tensors that are mapped from the file where that is possible.

    Attributes:
        path: The file.
        value: Of a TorchScript archive, its tensors by their ``state_dict`` names.
        scripted: Whether it is a TorchScript archive.
    """

    path: Path
    value: Any
    scripted: bool = False

    def tensors(self, mapping: Any, what: str) -> dict[str, Tensor]:
        """A dictionary of tensors; InputError for one that holds anything else."""
        if not isinstance(mapping, dict):
            raise InputError(f"{self.path}: {what} is no dictionary of tensors")
        for key, value in mapping.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise InputError(f"{self.path}: {what} holds {printable(str(key)[:80])!r}, which is no tensor")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise InputError(f"{self.path}: {printable(key)!r} claims more elements than its storage has")
        return dict(mapping)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; InputError if it is none."""
    from safetensors.torch import load_file

    return _read(path, lambda: load_file(path))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file straight from the tensors' memory; OSError where that cannot be done."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # of the system, which it hides
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # the file begins as its owner's alone


def is_torch(path: Path) -> bool:
    """Whether a file begins as those of torch do, zipped or not."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    return start.startswith(b"PK\x03\x04") or start == _LEGACY


def read_torch(path: Path) -> TorchFile:
    """What ``torch.save`` or ``torch.jit.save`` wrote; InputError if it is none, is damaged or asks for code."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        check_zip(path)
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
        if scripted:
            return TorchFile(path, _read(path, lambda: _scripted(path)), scripted=True)
    return TorchFile(path, _read(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)))


def check_zip(path: Path) -> None:
    """InputError for a zip with a damaged record, which torch does not look for, or with compressed tensors."""

    def test() -> None:
        with zipfile.ZipFile(path) as archive:
            stored = (record for record in archive.infolist() if "/data/" in record.filename)
            if any(record.compress_type != zipfile.ZIP_STORED for record in stored):
                raise InputError(f"{path}: holds compressed tensors, so it is no file of torch's")
            if (damaged := archive.testzip()) is not None:
                raise InputError(f"{path}: damaged: {printable(damaged)} is not what was written")

    _read(path, test)


def read_arrays(path: Path) -> Any:
    """A pickle of plain values and numpy or jax arrays; InputError if it is none, is damaged or asks for code."""

    def load() -> Any:
        with path.open("rb") as file:
            return _Unpickler(file, _ARRAYS).load()

    return _read(path, load)


def array(path: Path, where: str, value: Any) -> Tensor:
    """A tensor of an array that ``read_arrays`` gave, in the array's memory; InputError if it is none of numbers."""
    if not isinstance(value, _Array) or not isinstance(value.dtype, _DType) or value.dtype.name not in _NUMBERS:
        raise InputError(f"{path}: {where} is no array of numbers")

    def made() -> Tensor:
        flat = np.frombuffer(value.data, f"{value.dtype.order}{value.dtype.name}")
        shaped = flat.reshape(value.shape, order="F" if value.fortran else "C")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bytes of a pickle are not to be written to, and are not
            return torch.from_numpy(shaped.astype(shaped.dtype.newbyteorder("="), copy=False))

    return _read(path, made)


def _read(path: Path, load: Callable[[], T]) -> T:
    """What a library makes of a file; whatever it raises is one line."""
    try:
        return load()
    except (InputError, OSError):
        raise
    except BaseException as error:  # pickle, zipfile, torch and safetensors have no common class
        if not is_failure(error):
            raise
        raise InputError(f"{path}: cannot be read as weights ({one_line(error, 200)})") from error


class _Unpickler(pickle.Unpickler):
    """Python's unpickler: a name outside its list is an error; ``storage`` is for TorchScript archives."""

    def __init__(
        self, file: Any, names: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(file)
        self._names, self._storage = names, storage

    def find_class(self, module: str, name: str) -> Any:
        if self._storage is not None and module.partition(".")[0] == "__torch__":
            return _Module
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which no file of weights needs")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise pickle.UnpicklingError("refers to something outside of it")
        return self._storage(pid)


class _Module:
    """A module of a TorchScript archive: its attributes and no code."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """As torch's own function of this place, which wants storages of a deprecated kind."""
    untyped, dtype = storage
    return torch.empty(0, dtype=dtype).set_(untyped, offset, shape, strides)


def _scripted(path: Path) -> dict[str, Tensor]:
    """A TorchScript archive's parameters and buffers by their ``state_dict`` names."""
    reader: Any = torch._C.PyTorchFileReader(str(path))
    mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def storage(pid: Any) -> Any:
        kind, typed, key, _, numel = pid[:5]
        if kind != "storage" or typed not in _STORAGES:
            raise pickle.UnpicklingError("refers to something else than a storage")
        dtype = _STORAGES[typed]
        start, size = reader.get_record_offset(f"data/{key}"), numel * dtype.itemsize
        if not 0 <= size == reader.get_record_size(f"data/{key}"):
            raise pickle.UnpicklingError("has a storage of another size than it claims")
        return mapped[start : start + size], dtype

    names = {
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch.jit._pickle", "build_intlist"): tuple,
        ("collections", "OrderedDict"): dict,
    } | {("torch", name): name for name in _STORAGES}
    root = _Unpickler(io.BytesIO(reader.get_record("data.pkl")), names, storage).load()
    tensors: dict[str, Tensor] = {}
    walk, seen = [("", root)], {id(root)}
    while walk:
        prefix, module = walk.pop()
        state = getattr(module, "state", None)
        if not isinstance(module, _Module) or not isinstance(state, dict):
            raise InputError(f"{path}: its modules are not the plain tree that torch.jit.save writes")
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, _Module) and id(value) not in seen:
                seen.add(id(value))
                walk.append((f"{prefix}{key}.", value))
    return tensors


class _DType:
    """A description of numbers, such as ``f4``, and their order of bytes."""

    def __init__(self, name: str, align: Any = False, copy: Any = False) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


class _Array:
    """What a pickle says of an array. numpy itself would trust what a stranger says of dtypes."""

    shape: Any = None
    dtype: Any = None
    fortran: Any = False
    data: Any = b""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state


def _array(state: Any) -> _Array:
    made = _Array()
    made.__setstate__(state)
    return made


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
    """An array whose state is still to come."""
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _array((1, shape, dtype, order == "F", data))


def _jax_array(make: Any, arguments: Any, state: Any, aval: Any) -> _Array:
    """An array of jax, which calls what it is given; here that must be numpy's function."""
    if make is not _reconstruct:
        raise pickle.UnpicklingError("holds an array that is made by something else than numpy")
    return _array(state)


class _Nothing:
    """A state of an optimiser, which nobody reads here."""

    def __init__(self, *_: Any) -> None:
        pass


_ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("jax._src.array", "_reconstruct_array"): _jax_array,
    ("haiku._src.data_structures", "FlatMapping"): dict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    ("optax._src.base", "EmptyState"): _Nothing,
    **{("optax._src.transform", f"ScaleBy{name}State"): _Nothing for name in ("Adam", "Schedule")},
    ("optax._src.wrappers", "MaskedState"): _Nothing,
}
