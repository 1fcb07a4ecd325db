"""From the text of a filter to its tree."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from cloob.errors import InputError, nearest
from cloob.search.where.tree import NUMBERS, TEXTS, And, Comparison, Filter, Literal, Not, Or

MAX_LENGTH = 10_000
"""Characters of a filter."""

MAX_COMPARISONS = 200
_MAX_DEPTH = 50
_MAX_INTEGER = 2**63 - 1
_WORD = r"[^\W\d]\w*"
_TOKEN = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*')|(?P<quoted>\"(?:[^\"]|\"\")+\")|(?P<date>\d{4}-\d\d(?:-\d\d(?:T[\d:.]+)?)?)(?![\w.])"
    rf"|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])|(?P<word>{_WORD})|(?P<sign><=|>=|<>|!=|==|[=<>(),]))"
)
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d+)?)?)?)?)?)?")
_KEYWORDS = frozenset(("and", "or", "not", "in", "like", "is", "null", "true", "false"))
_SAME = {"==": "=", "<>": "!="}


def parse(text: str, columns: Collection[str] | None = None) -> Filter:
    """Reads a filter.

    Args:
        text: As :mod:`cloob.search.where` describes; at most ``MAX_LENGTH`` characters.
        columns: The other columns that the index's sources have; None takes any name.

    Returns:
        The filter.

    Raises:
        InputError: What is wrong and at which character, or a column that nothing has, with the nearest that there is.

    Example:
        >>> parse("date >= 2024")
        Comparison(column='date', operator='>=', value='2024')
    """
    return _Parser(text, columns).filter()


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    place: int


class _Parser:
    """Recursive descent; depth and number of comparisons are bounded, since databases' own parsers have bounds too."""

    def __init__(self, text: str, columns: Collection[str] | None) -> None:
        self._text, self._columns = text, columns
        self._tokens = self._read_tokens()
        self._next = 0
        self._comparisons = 0

    def filter(self) -> Filter:
        found = self._either(0)
        if (token := self._peek()).kind != "end":
            raise self._error(token, "'and', 'or' or the end")
        return found

    def _either(self, depth: int) -> Filter:
        operands = [self._both(depth)]
        while self._take("or"):
            operands.append(self._both(depth))
        return operands[0] if len(operands) == 1 else Or(tuple(operands))

    def _both(self, depth: int) -> Filter:
        operands = [self._one(depth)]
        while self._take("and"):
            operands.append(self._one(depth))
        return operands[0] if len(operands) == 1 else And(tuple(operands))

    def _one(self, depth: int) -> Filter:
        if depth > _MAX_DEPTH:
            raise self._wrong(self._peek(), f"more than {_MAX_DEPTH} brackets and 'not' inside each other")
        if self._take("not"):
            return Not(self._one(depth + 1))
        if self._take("("):
            found = self._either(depth + 1)
            self._want(")")
            return found
        return self._comparison()

    def _comparison(self) -> Comparison:
        self._comparisons += 1
        name = self._peek()
        if self._comparisons > MAX_COMPARISONS:
            raise self._wrong(name, f"more than {MAX_COMPARISONS} comparisons")
        column = self._column()
        if self._take("is"):
            negated = self._take("not")
            self._want("null")
            return Comparison(column, "is not null" if negated else "is null", None)
        negated = self._take("not")
        if self._take("like"):
            return Comparison(column, "not like" if negated else "like", self._pattern(name, column))
        if self._take("in"):
            self._want("(")
            values = [self._literal(column, "=")]
            while self._take(","):
                values.append(self._literal(column, "="))
            self._want(")")
            return Comparison(column, "not in" if negated else "in", tuple(values))
        token = self._peek()
        operator = _SAME.get(token.text, token.text)
        if negated or token.kind != "sign" or operator not in ("=", "!=", "<", "<=", ">", ">="):
            raise self._error(token, "'like' or 'in'" if negated else "=, !=, <, <=, >, >=, like, in or is null")
        self._next += 1
        return Comparison(column, operator, self._literal(column, operator))

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

    def _pattern(self, name: _Token, column: str) -> str:
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
        if column == "date":
            return self._date(token)
        if column in TEXTS:
            return _unquoted(token)
        if token.kind == "word":
            if column in NUMBERS or operator not in ("=", "!="):
                raise self._wrong(token, f"{word} cannot be compared with {column} by {operator}")
            return word == "true"
        if token.kind == "number":
            return self._number(token, token.text)
        if column in NUMBERS:
            raise self._wrong(token, f"{column} is compared with a number, not with {token.text}")
        return _unquoted(token)

    def _date(self, token: _Token) -> str:
        date = _unquoted(token)
        if not _DATE.fullmatch(date):
            raise self._wrong(token, f"{token.text} is no date; write 2024, 2024-05, 2024-05-31 or '2024-05-31T18:30'")
        return date.replace(" ", "T")

    def _number(self, token: _Token, text: str) -> int | float:
        value = int(text) if re.fullmatch(r"[+-]?\d{1,30}", text) else float(text)
        if not math.isfinite(value) or abs(value) > _MAX_INTEGER:
            raise self._wrong(token, f"{text} is too large a number")
        return value

    def _read_tokens(self) -> list[_Token]:
        if len(self._text) > MAX_LENGTH:
            raise InputError(f"filter: {len(self._text):,} characters, at most {MAX_LENGTH:,} are read")
        odd = re.search("[\0\ud800-\udfff]", self._text)
        if odd:
            raise InputError(f"filter: a character that is no text at character {odd.start() + 1}")
        tokens, place = [], 0
        while match := _TOKEN.match(self._text, place):
            kind = match.lastgroup or ""
            tokens.append(_Token(kind, match[kind], match.start(kind)))
            place = match.end()
        tokens.append(_Token("end", "", len(self._text)))
        rest = self._text[place:].lstrip()
        if rest:
            start = len(self._text) - len(rest)
            said = "the quote is not closed" if rest[0] in "'\"" else f"{rest[:10]!r} cannot be read"
            raise self._wrong(_Token("end", rest, start), said)
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


def _unquoted(token: _Token) -> str:
    return token.text[1:-1].replace("''", "'") if token.kind == "text" else token.text
