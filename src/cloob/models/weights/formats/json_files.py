"""JSON from strangers: one value a key, finite numbers, bounded size and depth; a config's fields in their ranges."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.models.weights.formats.pickles import printable

_MAX_BYTES = 16_000_000
LARGEST = 1 << 24
"""No width, depth, vocabulary or picture of a model is larger."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: It is not readable, or holds what ``parse_json`` refuses.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(f"{path}: {size} bytes, too large for a configuration")
        return parse_json(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """An object from JSON.

    Raises:
        InputError: It is no JSON or no object, a key is there twice, a number is not finite, or it is nested too deep.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{path}: the key {printable(twice)!r} is there twice")
        return found

    def no_number(word: str) -> Any:
        raise InputError(f"{path}: holds {word}, which is no number")

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path}: nested too deep") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object wanted, {type(value).__name__} found")
    return value


class Fields:
    """A config's object, whose fields are taken with their kind and range checked.

    Args:
        path: The file, for errors.
        values: The object.
        prefix: What stands before a field's name in an error.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def inside(self, key: str) -> Fields:
        """The object under a key.

        Raises:
            InputError: There is none.
        """
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(self.path, value, f"{self.prefix}{key}.")

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """A whole number."""
        value = self.values.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        if positive and not 0 < value < 1e6:
            raise self.wrong(key, "a positive number")
        return float(value)

    def one_of(self, key: str, options: tuple[str, ...], default: str | None = None) -> str:
        """One of some words."""
        value = self.values.get(key, default)
        if value not in options:
            raise self.wrong(key, " or ".join(map(repr, options)))
        return str(value)

    def channels(self, key: str, default: list[float] | None = None, *, positive: bool = False) -> tuple[float, ...]:
        """Three finite numbers, one a colour."""
        value = self.values.get(key, default)
        kinds = isinstance(value, list | tuple) and all(
            isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item) for item in value
        )
        if not kinds or len(value) != 3 or (positive and min(value) <= 0):
            raise self.wrong(key, "three positive numbers" if positive else "three numbers")
        return tuple(float(item) for item in value)

    def wrong(self, key: str, wanted: str) -> InputError:
        """The error for a field."""
        found = printable(repr(self.values.get(key, "nothing")))
        return InputError(f"{self.path}: {self.prefix}{key} is {found[:60]}; {wanted} is wanted")
