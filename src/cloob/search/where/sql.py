"""From the tree of a filter to a condition that a database takes."""

from __future__ import annotations

import typing
from collections.abc import Sequence

from cloob.search.records import as_text, valid
from cloob.search.where.tree import NUMBERS, TEXTS, And, Comparison, Filter, Literal, Not, Or

Dialect = typing.Literal["sqlite", "postgresql"]


def sql(filter_: Filter, dialect: Dialect) -> tuple[str, list[Literal | bytes]]:
    """A filter as a condition for a database; whatever the filter holds travels as parameters.

    Args:
        filter_: What :func:`parse` returned.
        dialect: SQLite's (``?``, JSON by ``json_each``) or PostgreSQL's (``%s``, ``jsonb``).

    Returns:
        The condition, in brackets, over the columns ``id, path, source, date, bytes, width, height, caption`` and
        ``columns`` (JSON), which is true or false and never null; and its parameters in order.
    """
    parameters: list[Literal | bytes] = []
    text = _SQL[dialect](parameters).condition(filter_)
    return f"({text})", parameters


class _Sqlite:
    """Writes conditions; parameters are appended in the order in which their places are written."""

    like = "LIKE {} ESCAPE '\\'"
    collate = number = ""

    def __init__(self, parameters: list[Literal | bytes]) -> None:
        self._parameters = parameters

    def condition(self, filter_: Filter) -> str:
        if isinstance(filter_, Not):
            return f"NOT ({self.condition(filter_.operand)})"
        if isinstance(filter_, And | Or):
            joint = " AND " if isinstance(filter_, And) else " OR "
            return joint.join(f"({self.condition(operand)})" for operand in filter_.operands)
        operator, value = filter_.operator, filter_.value
        if operator in ("!=", "not in", "not like"):
            equal = {"!=": "=", "not in": "in", "not like": "like"}[operator]
            present = self.present(filter_.column)
            return f"{present} AND NOT ({self.condition(Comparison(filter_.column, equal, value))})"
        if operator in ("is null", "is not null"):
            return f"{'' if operator == 'is not null' else 'NOT '}{self.present(filter_.column)}"
        values = value if isinstance(value, tuple) else (value,)
        if filter_.column in (*TEXTS, *NUMBERS):
            return self._fixed(filter_.column, operator, values)
        kinds = [[v for v in values if _kind(v) == kind] for kind in ("number", "text", "bool")]
        return " OR ".join(self.json(filter_.column, operator, some) for some in kinds if some)

    def present(self, column: str) -> str:
        """That an item has something there."""
        if column in (*TEXTS, *NUMBERS):
            return f"({_expression(column)} IS NOT NULL)"
        return f"EXISTS (SELECT 1 FROM json_each(columns) WHERE key = {self._add(column)} AND type != 'null')"

    def json(self, column: str, operator: str, values: Sequence[Literal]) -> str:
        """A comparison with values of one kind in a column of the source."""
        key = self._add(column)
        if _kind(values[0]) == "bool":
            types = ", ".join("'true'" if value else "'false'" for value in values)
            return f"EXISTS (SELECT 1 FROM json_each(columns) WHERE key = {key} AND type IN ({types}))"
        types = "'integer', 'real'" if _kind(values[0]) == "number" else "'text'"
        compared = self._compared("value", operator, values)
        return f"EXISTS (SELECT 1 FROM json_each(columns) WHERE key = {key} AND type IN ({types}) AND {compared})"

    def _fixed(self, column: str, operator: str, values: Sequence[Literal]) -> str:
        expression = _expression(column)
        if column == "date" and operator not in ("like", "not like"):
            lengths = sorted({len(str(value)) for value in values})
            parts = [
                self._compared(f"substr(date, 1, {n})", operator, [v for v in values if len(str(v)) == n])
                for n in lengths
            ]
            return f"date IS NOT NULL AND ({' OR '.join(parts)})"
        return f"{expression} IS NOT NULL AND {self._compared(expression, operator, values)}"

    def _compared(self, expression: str, operator: str, values: Sequence[Literal]) -> str:
        text = isinstance(values[0], str)
        expression += self.collate if text else ""
        if operator == "like":
            return f"{expression} {self.like.format(self._add(values[0]))}"
        cast = self.number if not text and not isinstance(values[0], bool) else ""
        places = ", ".join(self._add(value) + cast for value in values)
        return f"{expression} IN ({places})" if operator == "in" else f"{expression} {operator} {places}"

    def _add(self, value: Literal) -> str:
        """The place of a parameter; SQLite takes the bytes of text that is not UTF-8, as in a file's name."""
        assert value is not None
        if isinstance(value, str) and valid(value) != value:
            self._parameters.append(value.encode("utf-8", "surrogateescape"))
            return "CAST(? AS TEXT)"
        self._parameters.append(value)
        return "?"


class _Postgresql(_Sqlite):
    like = "ILIKE {}"
    collate = ' COLLATE "C"'
    number = "::numeric"  # a float would overflow where the column's number is larger than any

    def present(self, column: str) -> str:
        if column in (*TEXTS, *NUMBERS):
            return super().present(column)
        return f"(coalesce(jsonb_typeof(columns -> {self._add(column)}::text), 'null') != 'null')"

    def json(self, column: str, operator: str, values: Sequence[Literal]) -> str:
        kind = {"number": "number", "text": "string", "bool": "boolean"}[_kind(values[0])]
        # CASE, since AND may look at its right side first, and a cast of text to a number would fail.
        test = f"CASE WHEN jsonb_typeof(columns -> {self._add(column)}::text) = '{kind}' THEN "
        cast = {"number": "::numeric", "string": "", "boolean": "::boolean"}[kind]
        arrow = "->>" if kind == "string" else "->"
        value = f"(columns {arrow} {self._add(column)}::text){cast}"
        return f"{test}{self._compared(value, operator, values)} ELSE false END"

    def _add(self, value: Literal) -> str:
        """The place of a parameter; text as PostgreSQL holds it."""
        assert value is not None
        self._parameters.append(as_text(value) if isinstance(value, str) else value)
        return "%s"


_SQL: dict[Dialect, type[_Sqlite]] = {"sqlite": _Sqlite, "postgresql": _Postgresql}


def _kind(value: Literal) -> str:
    if isinstance(value, bool):
        return "bool"
    return "text" if isinstance(value, str) else "number"


def _expression(column: str) -> str:
    """A column that every item has; the name is what follows the last slash or ``::`` of the path."""
    if column != "name":
        return column
    path = "replace(path, '::', '/')"
    return f"substr({path}, length(rtrim({path}, replace({path}, '/', ''))) + 1)"
