"""What an ONNX file of unknown origin may hold: one graph of standard operators over weights that are really there.

Looked at before onnxruntime opens the file. Numbers of a file's fields are those of onnx.proto (Apache-2.0).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

from cloob.errors import InputError, one_line
from cloob.models.onnx.protobuf import Buffer, Field, fields, numbers, text

FLOAT, INT64 = 1, 7
_ITEM_BYTES = {FLOAT: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, INT64: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""Bytes an entry by the number of the dtype: float32, (u)int8, (u)int16, int32, int64, bool, float16, float64, …"""
_DOMAINS = ("", "ai.onnx")
_MOST_NODES = 100_000
_MOST_DIMENSIONS = 16
EXTERNAL = ".data"
"""What the file with the weights is called behind the name of the graph's, where a graph is too large for one file."""


@dataclass(frozen=True)
class Port:
    """The one input or output of a graph.

    Attributes:
        name: Its name.
        dtype: ``FLOAT`` or ``INT64``.
        shape: Its sizes; None where any goes.
    """

    name: str
    dtype: int
    shape: tuple[int | None, ...]


class _RefusedError(ValueError):
    """What is wrong with a file, without its name."""


def check_graph(path: Path, source: Port, result: Port) -> None:
    """Refuses a file that is no graph with these ends, or that holds more than operators and weights.

    Refused are graphs in graphs (loops), functions, operators of others than ONNX itself, weights whose size is not
    that of their bytes, and weights in any other file than the one of the graph's name behind which ``.data`` stands.

    Args:
        path: The file.
        source: What its one input has to be.
        result: What its one output has to be.

    Raises:
        InputError: The line says what is wrong.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise _RefusedError("an empty file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as data:
                _check_model(data, path, source, result)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        said = (
            str(error) if isinstance(error, _RefusedError) else f"damaged, or not an ONNX file ({one_line(error, 100)})"
        )
        raise InputError(f"{path}: {said}") from None


def _check_model(data: Buffer, path: Path, source: Port, result: Port) -> None:
    graphs = []
    for field in fields(data, 0, len(data)):
        if field.number == 7:
            graphs.append(_bytes_of(field))
        elif field.number == 25:
            raise _RefusedError("has functions of its own, which are not run")
    if len(graphs) != 1:
        raise _RefusedError(f"{len(graphs)} graphs found, one wanted: damaged, or not an ONNX file")
    ports: dict[int, list[Port]] = {11: [], 12: []}
    nodes = 0
    for field in fields(data, *graphs[0]):
        if field.number == 1:
            nodes += 1
            if nodes > _MOST_NODES:
                raise _RefusedError(f"more than {_MOST_NODES:,} operators")
            _check_node(data, field, path)
        elif field.number == 5:
            _check_tensor(data, field, path)
        elif field.number == 15:
            raise _RefusedError("has sparse weights, which are not read")
        elif field.number in ports:
            ports[field.number].append(_port(data, field))
    _check_port("input", ports[11], source)
    _check_port("output", ports[12], result)


def _check_node(data: Buffer, node: Field, path: Path) -> None:
    kind = domain = ""
    attributes = []
    for field in fields(data, *_bytes_of(node)):
        if field.number == 4:
            kind = text(data, field)
        elif field.number == 7:
            domain = text(data, field)
        elif field.number == 5:
            attributes.append(field)
    if domain not in _DOMAINS:
        raise _RefusedError(f"has the operator {kind[:60]!r} of {domain[:60]!r}; those of ONNX itself alone are run")
    for attribute in attributes:
        for field in fields(data, *_bytes_of(attribute)):
            if field.number in (5, 10):
                _check_tensor(data, field, path)
            elif field.number in (6, 11):
                raise _RefusedError(f"its operator {kind[:60]!r} holds a graph of its own, which is not run")
            elif field.number in (22, 23):
                raise _RefusedError("has sparse weights, which are not read")


def _check_tensor(data: Buffer, tensor: Field, path: Path) -> None:
    """Holds a tensor's shape against the bytes that are there for it."""
    shape: list[int] = []
    dtype, name, raw, listed, external = 0, "", -1, 0, {}
    for field in fields(data, *_bytes_of(tensor)):
        if field.number == 1:
            shape += numbers(data, field, _MOST_DIMENSIONS)
        elif field.number == 2:
            dtype = field.value
        elif field.number == 8:
            name = text(data, field)[:60]
        elif field.number == 9:
            raw = field.end - field.start
        elif field.number in (4, 5, 7, 10, 11):
            listed += field.end - field.start if field.start >= 0 else 8
        elif field.number == 13:
            key, value = _entry(data, field)
            external[key] = value
    if dtype not in _ITEM_BYTES:
        raise _RefusedError(f"the weights {name!r} have dtype {dtype}, which is not read")
    if len(shape) > _MOST_DIMENSIONS or any(side < 0 for side in shape):
        raise _RefusedError(f"the weights {name!r} have the shape {shape[:8]}")
    entries = math.prod(shape)
    wanted = entries * _ITEM_BYTES[dtype]
    if external:
        _check_external(path, name, external, wanted)
    elif (raw != wanted) if raw >= 0 else entries > listed:
        there = raw if raw >= 0 else listed
        raise _RefusedError(f"the weights {name!r} of shape {shape} have {there:,} bytes instead of {wanted:,}")


def _check_external(path: Path, name: str, external: dict[str, str], wanted: int) -> None:
    """Holds what a tensor says of its place in another file against that file, which may be one alone."""
    place = external.get("location", "")
    own = path.name + EXTERNAL
    if place != own:
        raise _RefusedError(f"the weights {name!r} are said to be in {place[:80]!r}; {own} alone is read")
    try:
        offset, length = int(external.get("offset", "0")), int(external.get("length", str(wanted)))
    except ValueError:
        raise _RefusedError(f"the weights {name!r}: their place in {own} is no number") from None
    other = path.with_name(own)
    size = other.stat().st_size if other.is_file() else -1
    if size < 0:
        raise _RefusedError(f"its weights are in {own}, which is not there")
    if length != wanted or offset < 0 or offset + length > size:
        raise _RefusedError(f"the weights {name!r} are not where they should be in {own} (cut short?)")


def _entry(data: Buffer, field: Field) -> tuple[str, str]:
    """A key and its value."""
    parts = {part.number: text(data, part) for part in fields(data, *_bytes_of(field))}
    return parts.get(1, ""), parts.get(2, "")


def _port(data: Buffer, value: Field) -> Port:
    """An input or output as the file describes it."""
    name, dtype = "", 0
    shape: list[int | None] = []
    for field in fields(data, *_bytes_of(value)):
        if field.number == 1:
            name = text(data, field)
        elif field.number == 2:
            for kind in fields(data, *_bytes_of(field)):
                for part in fields(data, *_bytes_of(kind)) if kind.number == 1 else ():
                    if part.number == 1:
                        dtype = part.value
                    elif part.number == 2:
                        shape += [_side(data, side) for side in fields(data, *_bytes_of(part))]
    return Port(name, dtype, tuple(shape))


def _side(data: Buffer, side: Field) -> int | None:
    return next((part.value for part in fields(data, *_bytes_of(side)) if part.number == 1), None)


def _check_port(kind: str, found: list[Port], wanted: Port) -> None:
    if len(found) != 1:
        raise _RefusedError(f"{len(found)} {kind}s found, one wanted: {wanted.name}")
    port = found[0]
    if port != wanted:
        raise _RefusedError(
            f"its {kind} is {port.name[:60]!r} {_shape(port)}; {wanted.name!r} {_shape(wanted)} is wanted here"
        )


def _shape(port: Port) -> str:
    kinds = {FLOAT: "float32", INT64: "int64"}
    sides = ", ".join("n" if side is None else str(side) for side in port.shape[:8])
    return f"{kinds.get(port.dtype, f'dtype {port.dtype}')} ({sides})"


def _bytes_of(field: Field) -> tuple[int, int]:
    """Where a message in a field begins and ends."""
    if field.start < 0:
        raise ValueError("a number where a message should be")
    return field.start, field.end
