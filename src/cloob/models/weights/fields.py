"""The fields of a configuration that anyone may have written, read with their kind and range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloob.errors import InputError, printable

RESIZE_MODES = ("shortest", "longest", "squash")
"""How open_clip makes a picture square."""


class Fields:
    """A configuration's object; each method reads one field, and raises InputError where it is not as wanted.

    Args:
        path: The file, for errors.
        values: The object.
        prefix: What stands before a field's name in an error.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def inside(self, key: str) -> Fields:
        """The object under a key."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(self.path, value, f"{self.prefix}{key}.")

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = 1 << 24) -> int:
        """A whole number."""
        value = self.values.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def divisor(self, key: str, of: int, default: int | None = None) -> int:
        """A whole number that divides another one, as heads do a width."""
        value = self.integer(key, default)
        if of % value:
            raise self.wrong(key, f"a divisor of {of}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number."""
        value: Any = self.values.get(key, default)
        least = 1e-30 if positive else -1e6
        if type(value) not in (int, float) or not least <= value < 1e6:
            raise self.wrong(key, "a positive number" if positive else "a finite number")
        return float(value)

    def one_of(self, key: str, options: Sequence[Any], default: Any = None) -> Any:
        """One of some values."""
        value = self.values.get(key, default)
        if value not in options:
            raise self.wrong(key, " or ".join(map(repr, options)))
        return value

    def channels(
        self, key: str, default: Sequence[float] | None = None, *, positive: bool = False
    ) -> tuple[float, ...]:
        """Three numbers, one a colour, that leave normalised pixels finite."""
        value = self.values.get(key, default)
        least = 1e-6 if positive else -1e6
        numbers = isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value)
        if not numbers or len(value) != 3 or not all(least <= item <= 1e6 for item in value):
            raise self.wrong(key, f"three numbers from {least:g} to 1e+06")
        return tuple(map(float, value))

    def wrong(self, key: str, wanted: str) -> InputError:
        """The error for a field."""
        value = printable(repr(self.values.get(key, "nothing")))
        return InputError(f"{self.path}: {self.prefix}{key} is {value[:60]}; {wanted} is wanted")
