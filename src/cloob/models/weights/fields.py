"""The fields of a stranger's configuration, each with its kind and range checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.errors import InputError, printable

RESIZE_MODES = ("shortest", "longest", "squash")
"""How open_clip makes a picture square."""
LARGEST = 1 << 24
"""No width, depth, vocabulary or picture of a model is larger."""


_FARTHEST = 1e6  # of a colour, so that normalised pixels stay finite


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
        """The object under a key; InputError if there is none."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(self.path, value, f"{self.prefix}{key}.")

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
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
        least = 1 / _FARTHEST if positive else -_FARTHEST
        if not kinds or len(value) != 3 or not least <= min(value) <= max(value) <= _FARTHEST:
            raise self.wrong(key, f"three numbers from {least:g} to {_FARTHEST:g}")
        return tuple(float(item) for item in value)

    def wrong(self, key: str, wanted: str) -> InputError:
        """The error for a field."""
        value = printable(repr(self.values.get(key, "nothing")))
        return InputError(f"{self.path}: {self.prefix}{key} is {value[:60]}; {wanted} is wanted")
