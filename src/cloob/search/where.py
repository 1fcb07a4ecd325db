r"""Filters over an index's metadata: a small language that is parsed to SQL; no text of
it reaches a database as SQL.

``date >= 2024 and (caption like '%dog%' or not camera is null)``. The page “Search and
sort pictures” describes it. In a pattern of ``like``, ``\`` takes the next character as
it is.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cloob.errors import InputError, nearest
from cloob.search.records import valid

Literal = str | int | float | bool

TEXTS = (
    "path",
    "name",
    "source",
    "date",
    "caption",
)  # columns of every item; `name` is the last part of the path
NUMBERS = ("id", "bytes", "width", "height")  # columns of every item
_MAX_DEPTH = 50
_TOKEN = re.compile(
    r"(?P<text>'(?:[^']|'')*')|(?P<quoted>\"(?:[^\"]|\"\")+\")|(?P<date>\d{4}-\d\d(?:-\d\d(?:T[\d:.]+)?)?)(?![\w.])"
    r"|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])|(?P<word>[^\W\d]\w*)"
    r"|(?P<sign><=|>=|<>|!=|==|[=<>(),])|(?P<other>\S+)|(?P<end>\Z)"
)
_DATE = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d+)?)?)?)?)?)?")
_KEYWORDS = frozenset(("and", "or", "not", "in", "like", "is", "null", "true", "false"))
_OPERATORS = {sign: sign for sign in ("=", "<", "<=", ">", ">=")} | {
    "==": "=",
    "!=": "!=",
    "<>": "!=",
}
_PATH = "replace(path, '::', '/')"
_NAME = f"substr({_PATH}, length(rtrim({_PATH}, replace({_PATH}, '/', ''))) + 1)"


Dialect = dict[str, Any]  # as ``sql.toml`` describes it
_SQL = tomllib.loads(Path(__file__).with_name("sql.toml").read_text(encoding="utf-8"))
STATEMENTS: dict[str, str] = _SQL["statements"]
SQLITE: Dialect = _SQL["sqlite"]


@dataclass(frozen=True)
class Filter:
    text: str

    def sql(self, dialect: Dialect) -> tuple[str, list[Literal]]:
        """A condition over the columns of ``cloob_items``, which is never null, and its
        parameters in order.
        """
        parser = _Parser(self.text, None, dialect)
        return f"({parser.condition()})", parser.parameters


def parse(
    text: str, columns: Collection[str] | None = None, hidden: Collection[str] = ()
) -> Filter:
    """Checks a filter, and where ``columns`` are given, that it names none but these;
    InputError reports what is wrong.

    It may name none that is ``hidden``.

    Example:
        >>> parse("date >= 2024").sql(SQLITE)
        ('(coalesce(substr(date, 1, 4) >= ?, false))', ['2024'])
    """
    _Parser(text, columns, SQLITE, hidden).condition()
    return Filter(text)


def equals(column: str, text: str) -> Filter:
    """The filter of the items with this text in a column."""
    return parse(f"{column} = '{text.replace(chr(39), 2 * chr(39))}'")


class _Parser:
    """Writes SQL token by token: ``not``, ``and`` and ``or`` bind in SQL as they do
    here.
    """

    def __init__(
        self,
        text: str,
        columns: Collection[str] | None,
        dialect: Dialect,
        hidden: Collection[str] = (),
    ) -> None:
        self._text, self._columns, self._dialect, self._hidden = (
            valid(text),
            columns,
            dialect,
            hidden,
        )
        self._tokens = _TOKEN.finditer(self._text)
        self._pop()
        self.parameters: list[Literal] = []

    def condition(self, depth: int = 0) -> str:
        if depth > _MAX_DEPTH:
            self._fail(f"more than {_MAX_DEPTH} brackets inside each other")
        written, joint = "", "first"
        while joint:
            while self._take("not"):
                written += "NOT "
            if self._take("("):
                written += f"({self.condition(depth + 1)})"
                self._take(")", needed=True)
            else:
                written += self._comparison()
            joint = self._take("and", "or")
            written += f" {joint.upper()} " if joint else ""
        if depth == 0 and self._kind != "end":
            self._expected("'and', 'or' or the end")
        return written

    def _comparison(self) -> str:
        column = self._column()
        if self._take("is"):
            negated = bool(self._take("not"))
            self._take("null", needed=True)
            return f"({self._column_value(column)} IS {'NOT ' * negated}NULL)"
        negated = bool(self._take("not"))
        values: list[Literal]
        if self._take("like"):
            if column in NUMBERS:
                self._fail(f"{column} is a number, and 'like' is for text")
            if self._kind != "text":
                self._expected("a pattern in quotes, such as '%dog%'")
            operator, values = self._dialect["like"], [self._value]
            self._pop()
        elif self._take("in"):
            self._take("(", needed=True)
            operator, values = "IN ({})", [self._literal(column)]
            while self._take(","):
                values.append(self._literal(column))
            self._take(")", needed=True)
        else:
            sign = _OPERATORS.get(self._word)
            if negated or sign is None:
                self._expected(
                    "'like' or 'in'"
                    if negated
                    else "=, !=, <, <=, >, >=, like, in or is null"
                )
            self._pop()
            values = [self._literal(column)]
            operator, negated = (
                ("= {}", True) if sign == "!=" else (sign + " {}", False)
            )
        if not negated:
            return self._compared(column, operator, values)
        return (
            f"({self._column_value(column)} IS NOT NULL AND NOT"
            f" ({self._compared(column, operator, values)}))"
        )

    def _compared(self, column: str, operator: str, values: list[Literal]) -> str:
        """False where the column has nothing; of ``in`` a part per kind of value."""
        groups: dict[tuple[str, int], list[Literal]] = {}
        for value in values:
            kind = {bool: "bool", str: "text"}.get(type(value), "number")
            cut = column == "date" and operator != self._dialect["like"]
            groups.setdefault((kind, len(str(value)) if cut else 0), []).append(value)
        parts = []
        for (kind, length), some in groups.items():
            left = (
                f"substr(date, 1, {length})"
                if length
                else self._column_value(column, kind)
            )
            if (
                operator == self._dialect["like"]
                and self._dialect["lower"]
                and not str(some[0]).isascii()
            ):
                left, some = self._dialect["lower"].format(left), [str(some[0]).lower()]
            left += self._dialect["collate"] if kind == "text" else ""
            place = self._dialect["number"] if kind == "number" else "?"
            part = operator.format(", ".join([place] * len(some)))
            if "above" in self._dialect and left == self._dialect["place"].format(
                column
            ):
                part, texts = _as_stored(
                    column, left, part, list(map(str, some)), self._dialect["above"]
                )
                self.parameters += texts
            else:
                part = f"{left} {part}"
                self.parameters += some
            parts.append(f"coalesce({part}, false)")
        return parts[0] if len(parts) == 1 else f"({' OR '.join(parts)})"

    def _column_value(self, column: str, kind: str = "any") -> str:
        """The value of an item in a column; null where that is nothing, or of another
        kind.
        """
        if column in ("path", "source") and kind != "any":  # which is never null
            return str(self._dialect["place"]).format(column)
        if column in (*TEXTS, *NUMBERS):
            return _NAME if column == "name" else column
        self.parameters.append(column)
        return str(self._dialect["json"]).format(*self._dialect["kinds"][kind])

    def _column(self) -> str:
        kind, name = self._kind, self._value
        if kind != "quoted" and (kind != "word" or name.lower() in _KEYWORDS):
            self._expected("a column's name")
        known = [
            item
            for item in (*TEXTS, *NUMBERS, *(self._columns or ()))
            if item not in self._hidden
        ]
        if name in self._hidden or (self._columns is not None and name not in known):
            self._fail(f"no column {name!r}; {nearest(name, known)}")
        self._pop()
        return name

    def _literal(self, column: str) -> Literal:
        kind, text, value = self._kind, self._word, self._value
        if kind not in ("text", "number", "date") and text.lower() not in (
            "true",
            "false",
        ):
            self._expected(
                "a value ('text' in quotes, a number, a date, true or false; or `is"
                " null`)"
            )
        if column == "date" and not _DATE.fullmatch(value):
            self._fail(
                f"{text} is no date; write 2024, 2024-05, 2024-05-31 or"
                " '2024-05-31T18:30'"
            )
        if column in NUMBERS and kind != "number":
            self._fail(f"{column} is compared with a number, not with {text}")
        self._pop()
        if column in TEXTS:
            return value.replace(" ", "T") if column == "date" else value
        if kind == "word":
            return text.lower() == "true"
        if kind != "number":
            return value
        number = int(text) if re.fullmatch(r"[+-]?\d{1,19}", text) else 2**63
        return number if -(2**63) <= number < 2**63 else float(text)

    def _pop(self) -> None:
        """Goes on: a kind is a group of ``_TOKEN``, a value a text without its
        quotes.
        """
        match = next(self._tokens)
        self._kind, self._word, self._start = (
            str(match.lastgroup),
            match[0],
            match.start(),
        )
        quote = self._word[:1]
        is_quoted = self._kind in ("text", "quoted")
        self._value = (
            self._word[1:-1].replace(2 * quote, quote) if is_quoted else self._word
        )

    def _take(self, *texts: str, needed: bool = False) -> str:
        """Goes on if the next token is one of these keywords or signs, and returns it;
        else nothing.
        """
        text = self._word.lower() if self._kind in ("word", "sign") else ""
        if text in texts:
            self._pop()
            return text
        if needed:
            self._expected(f"'{texts[0]}'")
        return ""

    def _expected(self, what: str) -> NoReturn:
        text = self._word[:40]
        self._fail(
            f"{what} is expected, {f'not {text}' if text else 'and the filter ends'}"
        )

    def _fail(self, message: str) -> NoReturn:
        place, text = self._start, self._text
        around = text if len(text) <= 80 else text[max(0, place - 40) : place + 40]
        raise InputError(
            " ".join(
                f"filter, at character {place + 1}: {message} (in: {around.strip()})".split()
            )
        )


def _as_stored(
    column: str, full: str, compared: str, values: list[str], above: str
) -> tuple[str, list[str]]:
    """A comparison of a path, which is in ``full``, and its parameters; where it can
    be, as the path is stored.

    From ``..//`` to ``..0`` are the paths in the folder ``above``, relative; after them
    are paths in full.
    """
    like, stored = compared.startswith("LIKE"), values
    if like and values[0].startswith(
        "%"
    ):  # and what follows does not match from within the beginning
        literal = re.split(r"[%_\\]", values[0].lstrip("%"))[0].lower()
        starts = [
            text[i:].lower()
            for text in (f"{above}/", "../../")
            for i in range(len(text) - 1)
        ]
        same = literal and not any(
            text.startswith(literal) or literal.startswith(text) for text in starts
        )
    else:
        stored = [f"..{value.removeprefix(above)}" for value in values]
        same = all(value.startswith(f"{above}/") for value in values) and not (
            like and re.search(r"[%_\\]", above)
        )
    if not same:
        return f"{full} {compared}", values
    outside = f"iif({column} < '..0', {column} {compared}, {column} {compared})"
    return f"iif({column} < '..//', {full} {compared}, {outside})", [
        *values,
        *stored,
        *values,
    ]
