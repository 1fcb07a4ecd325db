"""The tree of a filter, and the columns that every item has."""

from __future__ import annotations

from dataclasses import dataclass

Literal = str | int | float | bool | None

TEXTS = ("path", "name", "source", "date", "caption")
"""Columns of text that every item has; ``name`` is the last part of the path."""

NUMBERS = ("id", "bytes", "width", "height")
"""Columns of whole numbers that every item has."""


@dataclass(frozen=True)
class Comparison:
    """``column OP value``; OP is one of =, !=, <, <=, >, >=, like, not like, in, not in, is null, is not null."""

    column: str
    operator: str
    value: Literal | tuple[Literal, ...]


@dataclass(frozen=True)
class Not:
    """True where the operand is not."""

    operand: Filter


@dataclass(frozen=True)
class And:
    """True where all operands are."""

    operands: tuple[Filter, ...]


@dataclass(frozen=True)
class Or:
    """True where any operand is."""

    operands: tuple[Filter, ...]


Filter = Comparison | Not | And | Or
