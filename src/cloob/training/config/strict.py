"""Dataclasses from plain values and back, strictly: each key and type is checked, errors name the key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cloob.errors import InputError, nearest


def check(ok: bool, key: str, value: object, right: str) -> None:
    """Raises the one-line error of a bad value unless ``ok``."""
    if not ok:
        raise InputError(f"{key} is {value!r}; it must be {right}")


def positive(value: float) -> bool:
    """Whether a number is finite and above zero."""
    return math.isfinite(value) and value > 0


def check_choice(key: str, value: object, annotation: Any) -> None:
    """Checks a value against a ``Literal`` of texts."""
    options = typing.get_args(annotation)
    if value not in options:
        raise InputError(f"{key} is {value!r}; it must be one of {', '.join(options)}")


def hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass."""
    return typing.get_type_hints(cls)


def leaf_homes(cls: type) -> dict[str, str]:
    """The component in which each leaf of a nested config sits: ``{"lr": "optim", …}``."""
    return {leaf: part for part, kind in hints(cls).items() for leaf in hints(kind)}


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as JSON knows them."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def build(cls: type, values: Any, prefix: str = "") -> Any:
    """An instance of a (nested) config dataclass from plain values.

    Raises:
        InputError: A key is unknown, or a value has the wrong type or is out of range.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{prefix.rstrip('.') or 'the whole'} is {values!r}; it must be an object of keys")
    known = hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"unknown key {prefix + str(key)!r}; {_where(cls, str(key), prefix)}")
        if dataclasses.is_dataclass(known[key]):
            arguments[key] = build(known[key], value, f"{prefix}{key}.")
        else:
            arguments[key] = convert(value, known[key], prefix + key)
    return cls(**arguments)


def _where(cls: type, key: str, prefix: str) -> str:
    """What an unknown key may have been meant to be."""
    if prefix:
        return nearest(key, hints(cls))
    homes = leaf_homes(cls)
    return f"it belongs in {homes[key]!r}" if key in homes else nearest(key, [*hints(cls), *homes])


def convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the annotation wants it, or an InputError that names the key."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in args:
            return None
        return convert(value, next(arg for arg in args if arg is not type(None)), key)
    if origin is tuple:
        return _convert_tuple(value, args, key)
    if origin is Literal:
        check_choice(key, value, hint)
        return value
    if hint is Path and isinstance(value, str | Path):
        check(value != "", key, value, "the path of a file or folder")
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    raise InputError(f"{key} is {value!r}; it must be {names[hint]}")


def _convert_tuple(value: Any, args: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    check(isinstance(value, list | tuple), key, value, "a list")
    if Ellipsis in args:
        return tuple(convert(v, args[0], key) for v in value)
    check(len(value) == len(args), key, value, f"a list of {len(args)}")
    return tuple(convert(v, t, key) for v, t in zip(value, args, strict=True))
