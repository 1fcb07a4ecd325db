"""torch's files, read without running any: zip archives, TorchScript archives and the older form without a zip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cloob.errors import InputError
from cloob.models.weights.formats.archive import read_directory
from cloob.models.weights.formats.pickles import (
    MAX_SPELLED,
    Holder,
    Name,
    OrderedPairs,
    PickleRules,
    printable,
    read_pickle,
)
from cloob.models.weights.formats.stored import Stored, check_total, stored

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_DEPTH = 64
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
}


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor as the pickle tells of it, before its storage is looked up."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class TorchFile:
    """What a torch file holds.

    Attributes:
        path: The file.
        value: Plain values, ``TensorRef`` for tensors, ``Holder`` for TorchScript's modules.
        areas: First byte and size of each storage.
        scripted: Whether it is a TorchScript archive.
    """

    path: Path
    value: Any
    areas: Mapping[str, tuple[int, int]]
    scripted: bool = False

    def tensor(self, where: str, ref: TensorRef) -> Stored:
        """A tensor of the file; InputError if it does not fit its storage."""
        area = self.areas.get(ref.storage.key)
        if area is None or area[1] != ref.storage.numel * ref.storage.dtype.itemsize:
            raise InputError(f"{self.path}: {where} has a storage that is missing or of another size than it claims")
        return stored(self.path, where, area, ref.storage.dtype, ref.shape, ref.strides, ref.offset)

    def tensors(self, mapping: Any, what: str) -> dict[str, Stored]:
        """A dictionary of tensors; InputError for one that holds anything else."""
        if not isinstance(mapping, dict):
            raise InputError(f"{self.path}: {what} is no dictionary of tensors")
        tensors: dict[str, Stored] = {}
        for key, ref in mapping.items():
            if not isinstance(key, str) or not isinstance(ref, TensorRef):
                raise InputError(f"{self.path}: {what} holds {printable(str(key))!r}, which is no tensor")
            tensors[key] = self.tensor(repr(printable(key)), ref)
        check_total(self.path, tensors.values(), self.path.stat().st_size)
        return tensors

    def scripted_tensors(self) -> dict[str, Stored]:
        """A TorchScript archive's parameters and buffers by their ``state_dict`` names; InputError if it is no tree."""
        refs: dict[str, TensorRef] = {}
        seen: set[int] = set()
        spelled = 0
        walk: list[tuple[str, Any]] = [("", self.value)]
        while walk:
            prefix, module = walk.pop()
            if id(module) in seen or not isinstance(module, Holder) or not isinstance(module.state, dict):
                raise InputError(f"{self.path}: its modules are not the plain tree that torch.jit.save writes")
            if prefix.count(".") > _MAX_DEPTH:
                raise InputError(f"{self.path}: its modules are nested more than {_MAX_DEPTH} deep")
            seen.add(id(module))
            for key, value in module.state.items():
                if not isinstance(value, TensorRef | Holder):
                    continue
                name = f"{prefix}{key}"
                spelled += len(name)
                if spelled > MAX_SPELLED:
                    raise InputError(f"{self.path}: its names have more than {MAX_SPELLED:,} characters")
                if isinstance(value, TensorRef):
                    refs[name] = value
                else:
                    walk.append((f"{name}.", value))
        return self.tensors(refs, "the archive")


def read_torch(path: Path) -> TorchFile:
    """Reads a torch file: what ``torch.save`` or ``torch.jit.save`` wrote.

    Raises:
        InputError: It is none, is damaged, or holds what no file of weights needs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        read = _read_zip if start == b"PK\x03\x04" else _read_legacy
        content, refs = read(path, file, size)
    for ref in refs:
        content.tensor("a tensor", ref)
    return content


def is_legacy(path: Path) -> bool:
    """Whether a pickle begins with the number that marks torch's older files."""
    with path.open("rb") as file:
        return file.read(14) == b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


def _read_zip(path: Path, file: BinaryIO, size: int) -> tuple[TorchFile, list[TensorRef]]:
    records = read_directory(path, file, size)
    if "data.pkl" not in records:
        raise InputError(f"{path}: a zip without data.pkl, so not a file of torch's")
    order = records.get("byteorder")
    if order is not None:
        file.seek(order.start)
        if file.read(min(order.size, 16)) != b"little":
            raise InputError(f"{path}: written on a big-endian machine; its numbers cannot be read here")
    scripted = "constants.pkl" in records
    refs: list[TensorRef] = []
    pickle = records["data.pkl"]
    file.seek(pickle.start)
    value = read_pickle(path, file, pickle.start + pickle.size, _rules(refs, scripted=scripted))
    if file.tell() != pickle.start + pickle.size:
        raise InputError(f"{path}: data.pkl goes on behind its end")
    areas = {
        name.removeprefix("data/"): (record.start, record.size)
        for name, record in records.items()
        if name.startswith("data/")
    }
    return TorchFile(path, value, areas, scripted), refs


def _read_legacy(path: Path, file: BinaryIO, size: int) -> tuple[TorchFile, list[TensorRef]]:
    refs: list[TensorRef] = []
    rules, plain = _rules(refs), PickleRules({})
    magic = read_pickle(path, file, size, plain)
    protocol = read_pickle(path, file, size, plain)
    system = read_pickle(path, file, size, plain)
    if (
        magic != _MAGIC
        or protocol != _PROTOCOL
        or not isinstance(system, dict)
        or system.get("little_endian") is not True
    ):
        raise InputError(f"{path}: not a file that torch wrote on a little-endian machine")
    value = read_pickle(path, file, size, rules)
    keys = read_pickle(path, file, size, plain)
    widths = {ref.storage.key: ref.storage.dtype.itemsize for ref in refs}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(widths):
        raise InputError(f"{path}: its list of storages is not that of its tensors")
    areas = {}
    for key in keys:
        header = file.read(8)
        start, count = file.tell(), int.from_bytes(header, "little")
        if len(header) < 8 or count * widths[key] > size - start:
            raise InputError(f"{path}: cut short, or a storage claims more than the file has")
        areas[key] = (start, count * widths[key])
        file.seek(start + count * widths[key])
    if file.tell() != size:
        raise InputError(f"{path}: bytes behind its last storage")
    return TorchFile(path, value, areas), refs


def _rules(refs: list[TensorRef], *, scripted: bool = False) -> PickleRules:
    def rebuild(
        storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> TensorRef:
        if not isinstance(storage, _Storage) or not _whole(offset) or not _sizes(shape) or not _sizes(strides):
            raise TypeError
        if hooks or metadata:
            raise TypeError
        ref = TensorRef(storage, offset, shape, strides)
        refs.append(ref)
        return ref

    def parameter(data: Any, requires_grad: Any, hooks: Any) -> TensorRef:
        if not isinstance(data, TensorRef) or hooks:
            raise TypeError
        return data

    names = [
        Name("torch._utils", "_rebuild_tensor_v2", rebuild),
        Name("torch._utils", "_rebuild_parameter", parameter),
        Name("collections", "OrderedDict", OrderedPairs),
        *(Name("torch", kind) for kind in _DTYPES),
    ]
    if scripted:
        names.append(Name("torch.jit._pickle", "build_intlist", _whole_list))
    known = {(name.module, name.name): name for name in names}
    return PickleRules(known, _script_class if scripted else None, _storage)


def _storage(identifier: Any) -> _Storage:
    match identifier:
        case ("storage", Name(module="torch", name=kind), str(key), str(), int(numel)) if kind in _DTYPES:
            return _Storage(_DTYPES[kind], key, numel)
        case ("storage", Name(module="torch", name=kind), str(key), str(), int(numel), None) if kind in _DTYPES:
            return _Storage(_DTYPES[kind], key, numel)
    raise TypeError


def _script_class(module: str, name: str) -> Name | None:
    """A class of TorchScript's own: a plain holder, whatever its code would do."""
    if module != "__torch__" and not module.startswith("__torch__."):
        return None
    return Name(module, name, lambda: Holder(name))


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _sizes(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(_whole(number) for number in numbers)


def _whole_list(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list) or not all(_whole(number) for number in numbers):
        raise TypeError
    return tuple(numbers)
