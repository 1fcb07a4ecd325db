"""What a filter means, straight from its description: one item at a time."""

from __future__ import annotations

import re

from cloob.search.records import Item, Value
from cloob.search.where import NUMBERS, TEXTS, And, Comparison, Filter, Not, Or


def matches(filter_: Filter, item: Item) -> bool:
    if isinstance(filter_, Not):
        return not matches(filter_.operand, item)
    if isinstance(filter_, And):
        return all(matches(operand, item) for operand in filter_.operands)
    if isinstance(filter_, Or):
        return any(matches(operand, item) for operand in filter_.operands)
    there = value_of(filter_.column, item)
    if filter_.operator == "is null":
        return there is None
    if there is None:
        return False
    return _holds(filter_, there)


def value_of(column: str, item: Item) -> Value:
    if column == "name":
        return re.split("/|::", item.path)[-1]
    if column in (*TEXTS, *NUMBERS):
        return getattr(item, column)
    return item.columns.get(column)


def _holds(comparison: Comparison, there: Value) -> bool:
    operator, value = comparison.operator, comparison.value
    if operator == "is not null":
        return True
    if operator.startswith("not "):
        return not _holds(Comparison(comparison.column, operator.removeprefix("not "), value), there)
    if operator == "!=":
        return not _holds(Comparison(comparison.column, "=", value), there)
    if operator == "in":
        return any(_holds(Comparison(comparison.column, "=", one), there) for one in value)
    if operator == "like":
        return isinstance(there, str) and _like(value, there)
    if comparison.column == "date":
        there = there[: len(value)]
    if isinstance(value, bool) or isinstance(there, bool):
        return there is value
    if isinstance(value, str) is not isinstance(there, str):
        return False
    return {"=": there == value, "<": there < value, "<=": there <= value, ">": there > value, ">=": there >= value}[
        operator
    ]


def _like(pattern: str, text: str) -> bool:
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    expression = "".join({"%": ".*", "_": "."}.get(part, re.escape(_low(part[-1]))) for part in parts)
    return re.fullmatch(expression, _low(text), re.DOTALL) is not None


def _low(text: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in text)
