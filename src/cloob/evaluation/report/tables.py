"""How the report writes numbers, its tables (``tables.json`` has their columns), and
what is missing. No HTML.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""One model in the results of ``cloob.evaluate``."""

MISSING = "–"
_WORDS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "tables.json").read_text(encoding="utf-8")
)
METRICS: dict[str, str] = _WORDS["metrics"]
PROBLEMS: dict[str, list[str]] = _WORDS["problems"]
"""Kind -> heading, and what is counted at the head of the page: one, several."""
SETTINGS: dict[str, str] = _WORDS["settings"]
# By part of a row: columns (key, header, form, whether higher is better (1) or lower
# (-1), group), and of unreadable samples their name, the numbers that add up to the
# total, their fate.
_TABLES: dict[str, Any] = _WORDS["tables"]


def set_names(rows: Sequence[Row], key: str) -> list[str]:
    """The sets that any row has under ``key``, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get(key, ())))


def percent(value: float) -> str:
    """A fraction as a percentage without its sign: 0.172 -> ``17.2``."""
    return f"{100 * value:.1f}".replace("-", "−")


def points(value: float) -> str:
    """A difference of fractions in signed percentage points: 0.023 -> ``+2.3``."""
    return f"{100 * value:+z.1f}".replace("-", "−")


def decimal(value: float) -> str:
    """About three significant digits; an exponent only for tiny values."""
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return (text if value == 0 or abs(value) >= 0.0005 else f"{value:.1e}").replace(
        "-", "−"
    )


def count(value: float) -> str:
    """A full number with thin spaces (12345 -> ``12 345``); others with one decimal."""
    return (f"{value:,.0f}" if value == int(value) else f"{value:,.1f}").replace(
        ",", "\u202f"
    )


def duration(value: float) -> str:
    """Seconds for people: ``5.2 s``, ``3 min 12 s``, ``2 h 5 min``, with no line break
    before a unit.
    """
    if value < 10:
        return f"{value:.1f}\u00a0s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours}\u00a0h {minutes_left}\u00a0min"
    return f"{minutes}\u00a0min {seconds}\u00a0s" if minutes else f"{seconds}\u00a0s"


class Problem(NamedTuple):
    """What happened to a set (None: the model did not load) with a model (None: with
    all of them).
    """

    set: str | None
    model: str | None
    message: str


def problems(results: Mapping[str, Any]) -> dict[str, list[Problem]]:
    """``missing`` sets, ``unloaded`` models, ``failed`` measurements and ``unreadable``
    samples.
    """
    result: dict[str, list[Problem]] = {"missing": [], "unloaded": [], "failed": []}
    for entry in results.get("failures", ()):
        name, model = entry["set"], entry["model"]
        kind = "missing" if model is None else "unloaded" if name is None else "failed"
        error = entry["error"].removeprefix(f"{name}: ").removeprefix(f"{model}: ")
        result[kind].append(Problem(name, model, error))
    models: dict[tuple[str, str], list[str | None]] = {}
    rows = results["rows"]
    for row, (key, table) in itertools.product(rows, _TABLES.items()):
        for name, values in row.get(key, {}).items():
            if counts := values.get("unreadable"):
                samples, totals, fate = table["unreadable"]
                of = (
                    f" of {count(sum(values[total] for total in totals))}"
                    if totals
                    else ""
                )
                reasons = ", ".join(
                    f"{reason} × {n}" for reason, n in sorted(counts.items())
                )
                message = (
                    f"{count(sum(counts.values()))}{of} {samples} could not be read"
                    f" ({reasons}); {fate}"
                )
                models.setdefault((name, message), []).append(row["model"])
    result["unreadable"] = [
        Problem(name, model, message)
        for (name, message), some in models.items()
        for model in (
            [None] if len(some) == len(rows) else some
        )  # for all models it is listed once
    ]
    return result


class Cell(NamedTuple):
    """Its text, the number it sorts by, a second line, whether it is the best of its
    set, and a model's colour.
    """

    text: str
    value: float | None = None
    interval: str = ""
    best: bool = False
    colour: int | None = None


_FORMS: dict[str, Callable[[float], str]] = {
    form.__name__: form for form in (percent, count, decimal, duration)
}


def result_tables(
    results: Mapping[str, Any], colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The sortable tables that have something to show; a line is one set and one model,
    grouped by set.

    ``groups`` are (heading or "", number of columns) over the headers, empty without
    headings.
    """
    rows, tables = results["rows"], list[dict[str, Any]]()
    for kind, table in _TABLES.items():
        lines: list[tuple[str, str, Mapping[str, Any]]] = [
            (
                name,
                row["model"],
                row[kind][name] | {"train_seconds": row.get("train_seconds")},
            )
            for name in set_names(rows, kind)
            for row in rows
            if name in row.get(kind, {})
        ]
        columns = [
            column
            for column in table["columns"]
            if any(line[2].get(column[0]) is not None for line in lines)
        ]
        body = [
            [Cell(name), Cell(model, colour=colours[model])] for name, model, _ in lines
        ]
        for key, _, form, better, _ in columns:
            write = _FORMS[form]
            for cells, (name, _, values) in zip(body, lines, strict=True):
                value, ends = values.get(key), values.get(f"{key}_interval")
                if value is None or not math.isfinite(
                    value
                ):  # a median rank where half is unreadable
                    cells.append(Cell(MISSING))
                    continue
                # The best number of a set is in bold, if at least two models differ.
                scores = [
                    better * others[key]
                    for other, _, others in lines
                    if better and other == name
                ]
                best = bool(scores) and min(scores) < max(scores) == better * value
                cells.append(
                    Cell(write(value), value, " – ".join(map(write, ends or ())), best)
                )
        headers = ["Set", "Model", *(column[1] for column in columns)]
        groups = [
            (group, len(list(some)))
            for group, some in itertools.groupby(columns, operator.itemgetter(4))
        ]
        heads = [("", 2), *groups] if any(group for group, _ in groups) else []
        shown = {
            "id": kind,
            "caption": table["caption"],
            "groups": heads,
            "headers": headers,
            "rows": body,
        }
        tables += (
            [{**shown, "numeric": [i > 1 for i in range(len(headers))]}]
            if lines
            else []
        )
    return (
        [*tables, _differences(results, colours)]
        if results.get("differences")
        else tables
    )


def _differences(
    results: Mapping[str, Any], colours: Mapping[str, int]
) -> dict[str, Any]:
    """Every paired difference with its interval, in bold if that is clear of zero."""
    body = []
    for entry in results["differences"]:
        low, high = points(entry["low"]), points(entry["high"])
        clear = entry["low"] > 0 or entry["high"] < 0
        models = [
            Cell(entry[key], colour=colours[entry[key]])
            for key in ("model", "baseline")
        ]
        gap = Cell(
            points(entry["difference"]),
            entry["difference"],
            f"{low} to {high}",
            best=clear,
        )
        of = (
            Cell("mean of the sets" if entry["set"] is None else entry["set"]),
            *models,
            Cell(METRICS[entry["metric"]]),
        )
        body.append([*of, gap, Cell("yes" if clear else "no")])
    headers = [
        "Set",
        "Model",
        "Minus",
        "Measure",
        "Difference, points",
        "Clear of zero",
    ]
    table = {
        "id": "differences",
        "caption": "Differences, sample by sample",
        "groups": [],
    }
    return {
        **table,
        "headers": headers,
        "numeric": [i == 4 for i in range(6)],
        "rows": body,
    }
