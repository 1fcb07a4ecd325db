r"""Filters over an index's metadata: a small language that is parsed to SQL; no text of it reaches a database as SQL.

``date >= 2024 and (caption like '%dog%' or not camera is null)``: comparisons joined by ``and``, ``or``, ``not`` and
brackets. Text stands in single quotes, a quote in it twice. A column with another name than letters, digits and ``_``
stands in double quotes. What is compared:

- A comparison is false where the picture has nothing in that column; so ``not caption = 'dog'`` holds without one.
- ``date`` compares by as much as is written: ``date = 2024-05`` is all of May, ``date > 2024`` begins with 2025.
- ``like``: ``%`` is any text, ``_`` any one character, ``\`` takes the next character as it is; upper and lower case
  are the same (of the letters A to Z).
- Of other columns of the source a number compares with numbers alone, text with text alone, by code points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from cloob.errors import InputError, nearest

Literal = str | int | float | bool

TEXTS = ("path", "name", "source", "date", "caption")
"""Text columns of every item; ``name`` is the last part of the path."""

NUMBERS = ("id", "bytes", "width", "height")
"""Columns of whole numbers of every item."""

MAX_LENGTH = 10_000
"""Characters of a filter."""

_MAX_DEPTH = 50
_MAX_INTEGER = 2**63 - 1
_TOKEN = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*')|(?P<quoted>\"(?:[^\"]|\"\")+\")|(?P<date>\d{4}-\d\d(?:-\d\d(?:T[\d:.]+)?)?)(?![\w.])"
    r"|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])|(?P<word>[^\W\d]\w*)"
    r"|(?P<sign><=|>=|<>|!=|==|[=<>(),]))"
)
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d+)?)?)?)?)?)?")
_KEYWORDS = frozenset(("and", "or", "not", "in", "like", "is", "null", "true", "false"))
_OPERATORS = {sign: sign for sign in ("=", "<", "<=", ">", ">=")} | {"==": "=", "!=": "!=", "<>": "!="}
_PATH = "replace(path, '::', '/')"
_NAME = f"substr({_PATH}, length(rtrim({_PATH}, replace({_PATH}, '/', ''))) + 1)"


class Dialect(NamedTuple):
    """What differs between databases."""

    json: str  # the value of a key of `columns`; null where it is missing or of another kind
    kinds: dict[str, tuple[str, str]]  # by kind of value, what goes into `json`
    like: str  # a comparison that ignores case
    collate: str  # follows text, so that it compares by code points
    number: str  # the place of a number


SQLITE = Dialect(
    "(SELECT {} FROM json_each(columns) WHERE key = ? AND type {})",
    {
        "number": ("value", "IN ('integer', 'real')"),
        "text": ("value", "= 'text'"),
        "bool": ("value", "IN ('true', 'false')"),
        "any": ("value", "!= 'null'"),
    },
    like="LIKE {} ESCAPE '\\'",
    collate="",
    number="?",
)
POSTGRESQL = Dialect(
    "(SELECT {} FROM jsonb_each(columns) WHERE key = ? AND jsonb_typeof(value) {})",
    {
        "number": ("value::numeric", "= 'number'"),
        "text": ("value #>> '{}'", "= 'string'"),
        "bool": ("value::boolean", "= 'boolean'"),
        "any": ("value", "!= 'null'"),
    },
    like="ILIKE {} ESCAPE '\\'",
    collate=' COLLATE "C"',
    number="?::numeric",  # as a float it would overflow beside a larger number of a column
)


@dataclass(frozen=True)
class Filter:
    """A filter that :func:`parse` has checked."""

    text: str

    def sql(self, dialect: Dialect) -> tuple[str, list[Literal]]:
        """A condition over the columns of ``cloob_items``, which is never null, and its parameters in order."""
        parser = _Parser(self.text, None, dialect)
        return f"({parser.condition()})", parser.parameters


def parse(text: str, columns: Collection[str] | None = None) -> Filter:
    """Checks a filter, and where ``columns`` are given, that it names none but these.

    Raises:
        InputError: What is wrong and at which character; for an unknown column with the nearest that there is.

    Example:
        >>> parse("date >= 2024").sql(SQLITE)
        ('(coalesce(substr(date, 1, 4) >= ?, false))', ['2024'])
    """
    _Parser(text, columns, SQLITE).condition()
    return Filter(text)


def equals(column: str, text: str) -> Filter:
    """The filter of the items with this text in a column."""
    return parse(f"{column} = '{text.replace(chr(39), 2 * chr(39))}'")


class _Token(NamedTuple):
    kind: str
    text: str
    place: int


class _Parser:
    """Writes SQL token by token: ``not``, ``and`` and ``or`` bind in SQL as they do here."""

    def __init__(self, text: str, columns: Collection[str] | None, dialect: Dialect) -> None:
        self._text, self._columns, self._dialect = text, columns, dialect
        self._tokens = self._read_tokens()
        self._next = 0
        self.parameters: list[Literal] = []

    def condition(self, depth: int = 0) -> str:
        if depth > _MAX_DEPTH:
            raise self._wrong(self._peek(), f"more than {_MAX_DEPTH} brackets inside each other")
        written = ""
        while True:
            negated = False
            while self._take("not"):
                negated = not negated
            if self._take("("):
                part = f"({self.condition(depth + 1)})"
                self._want(")")
            else:
                part = self._comparison()
            written += f"NOT {part}" if negated else part
            joint = next((word for word in ("and", "or") if self._take(word)), None)
            if joint is None:
                break
            written += f" {joint.upper()} "
        if depth == 0 and (token := self._peek()).kind != "end":
            raise self._error(token, "'and', 'or' or the end")
        return written

    def _comparison(self) -> str:
        name = self._peek()
        column = self._column()
        if self._take("is"):
            negated = self._take("not")
            self._want("null")
            return f"({self._value(column)} IS {'NOT ' * negated}NULL)"
        negated = self._take("not")
        if self._take("like"):
            operator, values = self._dialect.like, [self._pattern(name, column)]
        elif self._take("in"):
            self._want("(")
            operator, values = "IN ({})", [self._literal(column, "=")]
            while self._take(","):
                values.append(self._literal(column, "="))
            self._want(")")
        else:
            token = self._peek()
            sign = _OPERATORS.get(token.text) if token.kind == "sign" else None
            if negated or sign is None:
                raise self._error(token, "'like' or 'in'" if negated else "=, !=, <, <=, >, >=, like, in or is null")
            self._next += 1
            values = [self._literal(column, sign)]
            operator, negated = ("= {}", True) if sign == "!=" else (sign + " {}", False)
        if not negated:
            return self._compared(column, operator, values)
        return f"({self._value(column)} IS NOT NULL AND NOT ({self._compared(column, operator, values)}))"

    def _compared(self, column: str, operator: str, values: list[Literal]) -> str:
        """False where the column has nothing; of ``in`` a part for each kind of value."""
        groups: dict[tuple[str, int], list[Literal]] = {}
        for value in values:
            cut = column == "date" and operator != self._dialect.like
            groups.setdefault((_kind(value), len(str(value)) if cut else 0), []).append(value)
        parts = []
        for (kind, length), some in groups.items():
            left = f"substr(date, 1, {length})" if length else self._value(column, kind)
            left += self._dialect.collate if kind == "text" else ""
            place = self._dialect.number if kind == "number" else "?"
            parts.append(f"coalesce({left} {operator.format(', '.join([place] * len(some)))}, false)")
            self.parameters += some
        return parts[0] if len(parts) == 1 else f"({' OR '.join(parts)})"

    def _value(self, column: str, kind: str = "any") -> str:
        """What an item has in a column; null where that is nothing, or of another kind."""
        if column in (*TEXTS, *NUMBERS):
            return _NAME if column == "name" else column
        self.parameters.append(column)
        return self._dialect.json.format(*self._dialect.kinds[kind])

    def _column(self) -> str:
        token = self._peek()
        if token.kind == "quoted":
            column = token.text[1:-1].replace('""', '"')
        elif token.kind == "word" and token.text.lower() not in _KEYWORDS:
            column = token.text
        else:
            raise self._error(token, "a column's name")
        self._next += 1
        known = (*TEXTS, *NUMBERS, *(self._columns or ()))
        if self._columns is not None and column not in known:
            raise self._wrong(token, f"no column {column!r}; {nearest(column, known)}")
        return column

    def _pattern(self, name: _Token, column: str) -> Literal:
        token = self._peek()
        if column in NUMBERS:
            raise self._wrong(name, f"{column} is a number, and 'like' is for text")
        if token.kind != "text":
            raise self._error(token, "a pattern in quotes, such as '%dog%'")
        pattern = _unquoted(token)
        if re.sub(r"\\.", "", pattern, flags=re.DOTALL).endswith("\\"):
            raise self._wrong(token, "the pattern ends in \\, which takes the next character as it is")
        self._next += 1
        return pattern

    def _literal(self, column: str, operator: str) -> Literal:
        token = self._peek()
        word = token.text.lower()
        if token.kind == "word" and word == "null":
            raise self._wrong(token, f"nothing equals null; write {column} is null, or is not null")
        if token.kind == "word" and word not in ("true", "false"):
            raise self._wrong(token, f"{token.text!r} is a column or a word; text stands in quotes: '{token.text}'")
        if token.kind not in ("word", "text", "number", "date"):
            raise self._error(token, "a value: 'text', a number, a date, true or false")
        self._next += 1
        value = _unquoted(token)
        if column == "date":
            if not _DATE.fullmatch(value):
                wanted = "2024, 2024-05, 2024-05-31 or '2024-05-31T18:30'"
                raise self._wrong(token, f"{token.text} is no date; write {wanted}")
            return value.replace(" ", "T")
        if column in TEXTS:
            return value
        if token.kind == "word":
            if column in NUMBERS or operator not in ("=", "!="):
                raise self._wrong(token, f"{word} cannot be compared with {column} by {operator}")
            return word == "true"
        if token.kind == "number":
            number = int(value) if re.fullmatch(r"[+-]?\d{1,30}", value) else float(value)
            if not math.isfinite(number) or abs(number) > _MAX_INTEGER:
                raise self._wrong(token, f"{value} is too large a number")
            return number
        if column in NUMBERS:
            raise self._wrong(token, f"{column} is compared with a number, not with {token.text}")
        return value

    def _read_tokens(self) -> list[_Token]:
        if len(self._text) > MAX_LENGTH:
            raise InputError(f"filter: {len(self._text):,} characters, at most {MAX_LENGTH:,} are read")
        if odd := re.search("[\0\ud800-\udfff]", self._text):
            raise InputError(f"filter: a character that is no text at character {odd.start() + 1}")
        tokens, place = [], 0
        while match := _TOKEN.match(self._text, place):
            kind = match.lastgroup or ""
            tokens.append(_Token(kind, match[kind], match.start(kind)))
            place = match.end()
        tokens.append(_Token("end", "", len(self._text)))
        if rest := self._text[place:].lstrip():
            said = "the quote is not closed" if rest[0] in "'\"" else f"{rest[:10]!r} cannot be read"
            raise self._wrong(_Token("end", rest, len(self._text) - len(rest)), said)
        return tokens

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, wanted: str) -> bool:
        """Goes on if the next token is this keyword or sign."""
        token = self._peek()
        found = token.kind in ("word", "sign") and token.text.lower() == wanted
        self._next += found
        return found

    def _want(self, wanted: str) -> None:
        if not self._take(wanted):
            raise self._error(self._peek(), f"'{wanted}'")

    def _error(self, token: _Token, wanted: str) -> InputError:
        found = f"not {token.text[:40]}" if token.text else "and the filter ends"
        return self._wrong(token, f"{wanted} is wanted, {found}")

    def _wrong(self, token: _Token, said: str) -> InputError:
        around = self._text if len(self._text) <= 80 else f"{self._text[max(0, token.place - 40) : token.place + 40]}"
        line = " ".join(f"filter, at character {token.place + 1}: {said} (in: {around.strip()})".split())
        return InputError(line)


def _kind(value: Literal) -> str:
    return "bool" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


def _unquoted(token: _Token) -> str:
    return token.text[1:-1].replace("''", "'") if token.kind == "text" else token.text
