r"""Filters over an index's metadata: a small language that is parsed, never handed to a database as it stands.

``date >= 2024 and (caption like '%dog%' or not camera is null)``: comparisons joined by ``and``, ``or``, ``not`` and
brackets. Text stands in single quotes, a quote in it twice. A column with another name than letters, digits and ``_``
stands in double quotes. What is compared:

- A comparison is false where the picture has nothing in that column; so ``not caption = 'dog'`` holds without one.
- ``date`` compares by as much as is written: ``date = 2024-05`` is all of May, ``date > 2024`` begins with 2025.
- ``like``: ``%`` is any text, ``_`` any one character, ``\`` takes the next character as it is; upper and lower case
  are the same (in SQLite of the letters A to Z).
- Of other columns of the source a number compares with numbers alone, text with text alone, by code points.
"""

from cloob.search.where.parser import parse
from cloob.search.where.sql import Dialect, sql
from cloob.search.where.tree import NUMBERS, TEXTS, And, Comparison, Filter, Literal, Not, Or

__all__ = ["NUMBERS", "TEXTS", "And", "Comparison", "Dialect", "Filter", "Literal", "Not", "Or", "parse", "sql"]
