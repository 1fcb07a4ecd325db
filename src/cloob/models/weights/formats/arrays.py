"""Pickles of numpy and jax arrays: the names they may hold, and what stands for an array."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloob.errors import InputError
from cloob.models.weights.formats.pickles import Holder, Name, PickleRules, Span, printable, read_pickle
from cloob.models.weights.formats.stored import MAX_DIMENSIONS, Stored, stored

_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i4": torch.int32,
    "i8": torch.int64,
}
_OPTAX = (
    ("optax._src.base", "EmptyState"),
    ("optax._src.transform", "ScaleByAdamState"),
    ("optax._src.transform", "ScaleByScheduleState"),
    ("optax._src.wrappers", "MaskedState"),
)
_NDARRAY = Name("numpy", "ndarray")


@dataclass(frozen=True)
class _Buffer:
    """An array that came with all it needs, instead of in a state of its own."""

    span: Span | bytes
    dtype: Any
    shape: Any


def read_arrays(path: Path) -> Any:
    """The value of a pickle of arrays; ``array`` makes a tensor of one of them.

    Raises:
        InputError: It is none, is damaged, or holds what no file of weights needs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        value = read_pickle(path, file, size, PickleRules(_NAMES, numbered=True))
        if file.tell() != size:
            raise InputError(f"{path}: bytes behind the end of the pickle")
    return value


def array(path: Path, where: str, value: Any) -> Stored:
    """A tensor of what ``read_arrays`` gave for an array.

    Args:
        path: The file.
        where: What the error calls it.
        value: The array.

    Raises:
        InputError: It is no array of plain little-endian numbers in C order, or its sizes are not those of its bytes.
    """
    if isinstance(value, _Buffer):
        span, kind, shape = value.span, value.dtype, value.shape
    elif isinstance(value, Holder) and value.kind == "array" and _is_state(value.state):
        _, shape, kind, fortran, span = value.state
        if fortran is True and len(shape) > 1:
            raise InputError(f"{path}: {where} is stored in Fortran order, which its program never writes")
    else:
        raise InputError(f"{path}: {where} is no array")
    dtype = _dtype(path, where, kind)
    if not isinstance(span, Span) or not _is_shape(shape):
        raise InputError(f"{path}: {where} is no array of plain numbers")
    tensor = stored(path, where, (span.start, span.size), dtype, shape)
    if tensor.nbytes != span.size:
        raise InputError(f"{path}: {where} of shape {shape} has {span.size} bytes instead of {tensor.nbytes}")
    return tensor


def _is_state(state: Any) -> bool:
    return isinstance(state, tuple) and len(state) == 5 and _is_shape(state[1])


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        return False
    return all(type(size) is int and size >= 0 for size in shape)


def _dtype(path: Path, where: str, value: Any) -> torch.dtype:
    """The dtype that numpy's description stands for."""
    if not isinstance(value, Holder) or value.kind != "dtype" or not isinstance(value.arguments[0], str):
        raise InputError(f"{path}: {where} has a dtype that cannot be read")
    name = value.arguments[0]
    if name not in _DTYPES:
        raise InputError(f"{path}: {where} has dtype {printable(name)!r}; numbers are wanted")
    match value.state:
        case (3, "<", None, None, None, -1, -1, 0):
            return _DTYPES[name]
        case (_, ">", *_):
            raise InputError(f"{path}: {where} is big-endian; save it again in little-endian numbers")
    raise InputError(f"{path}: {where} has a dtype that cannot be read")


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> Holder:
    if kind is not _NDARRAY or shape != (0,):
        raise TypeError
    return Holder("array")


def _make_dtype(name: Any, align: Any, copy: Any) -> Holder:
    if align not in (False, 0) or copy not in (True, 1):
        raise TypeError
    return Holder("dtype", arguments=(name,))


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> _Buffer:
    if order != "C":
        raise TypeError
    return _Buffer(buffer, dtype, shape)


def _jax_array(function: Any, arguments: Any, state: Any, aval: Any) -> Holder:
    if not isinstance(function, Name) or function.call is not _reconstruct or not isinstance(arguments, tuple):
        raise TypeError
    made: Holder = _reconstruct(*arguments)
    made.state = state
    return made


def _flat_mapping(mapping: Any) -> dict[Any, Any]:
    if not isinstance(mapping, dict):
        raise TypeError
    return mapping


def _holder(*arguments: Any) -> Holder:
    return Holder("optax", state=(), arguments=arguments)


def _names() -> dict[tuple[str, str], Name]:
    names = [_NDARRAY, Name("numpy", "dtype", _make_dtype)]
    for numpy in ("numpy.core", "numpy._core"):
        names.append(Name(f"{numpy}.multiarray", "_reconstruct", _reconstruct))
        names.append(Name(f"{numpy}.numeric", "_frombuffer", _from_buffer))
    names.append(Name("jax._src.array", "_reconstruct_array", _jax_array))
    names.append(Name("haiku._src.data_structures", "FlatMapping", _flat_mapping))
    names += [Name(module, name, _holder) for module, name in _OPTAX]
    return {(name.module, name.name): name for name in names}


_NAMES = _names()
