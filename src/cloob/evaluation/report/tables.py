"""How the report writes numbers, its tables (``tables.json`` has their columns), and
what is missing. No HTML.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from cloob.evaluation.results import Difference, Numbers, Results, Row, Section


class _Words(TypedDict):
    """The words of a section's table in ``tables.json``."""

    caption: str
    columns: list[tuple[str, str, str, int]]
    # of unreadable samples their name, the numbers that add up to the total, their fate
    unreadable: tuple[str, list[str], str]


MISSING = "–"
_WORDS = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
METRICS: dict[str, str] = _WORDS["metrics"]
PROBLEMS: dict[str, list[str]] = _WORDS["problems"]
"""Kind -> heading, and what is counted at the head of the page: one, several."""
_TABLES: dict[Section, _Words] = _WORDS["tables"]


def set_names(rows: Sequence[Row], section: Section) -> list[str]:
    """The sets that any row has in a section, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get(section, ())))


def percent(value: float) -> str:
    """A fraction as a percentage without its sign: 0.172 -> ``17.2``."""
    return f"{100 * value:.1f}".replace("-", "−")


def points(value: float) -> str:
    """A difference of fractions in signed percentage points: 0.023 -> ``+2.3``."""
    return f"{100 * value:+z.1f}".replace("-", "−")


def decimal(value: float) -> str:
    """About three significant digits; an exponent only for tiny values."""
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    if 0 < abs(value) < 0.0005:
        text = f"{value:.1e}"
    return text.replace("-", "−")


def count(value: float) -> str:
    """A full number with thin spaces (12345 -> ``12 345``); others with one decimal."""
    text = f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    return text.replace(",", "\u202f")


_FORMS: dict[str, Callable[[float], str]] = {
    "percent": percent,
    "count": count,
    "decimal": decimal,
}


class Problem(NamedTuple):
    """What happened to a set (None: the model did not load) with a model (None: with
    all of them).
    """

    set: str | None
    model: str | None
    message: str


def problems(results: Results) -> dict[str, list[Problem]]:
    """``missing`` sets, ``unloaded`` models, ``failed`` measurements and ``unreadable``
    samples.
    """
    found: dict[str, list[Problem]] = {"missing": [], "unloaded": [], "failed": []}
    for failure in results.get("failures", ()):
        name, model = failure["set"], failure["model"]
        kind = "failed"
        if model is None:
            kind = "missing"
        elif name is None:
            kind = "unloaded"
        text = failure["error"].removeprefix(f"{name}: ").removeprefix(f"{model}: ")
        found[kind].append(Problem(name, model, text))
    found["unreadable"] = _unreadable(results["rows"])
    return found


def _unreadable(rows: Sequence[Row]) -> list[Problem]:
    """What could not be read of a set, once for all models."""
    found = []
    for row, (section, table) in itertools.product(rows, _TABLES.items()):
        for name, numbers in row.get(section, {}).items():
            if numbers.get("unreadable"):
                text = _unreadable_text(numbers, *table["unreadable"])
                found.append(Problem(name, None, text))
    return list(dict.fromkeys(found))


def _unreadable_text(
    numbers: Numbers, samples: str, totals: Sequence[str], fate: str
) -> str:
    """How many samples could not be read, why, and what became of them."""
    reasons = numbers["unreadable"]
    lost = count(sum(reasons.values()))
    if totals:
        lost += f" of {count(sum(numbers[total] for total in totals))}"
    listed = ", ".join(f"{reason} × {n}" for reason, n in sorted(reasons.items()))
    return f"{lost} {samples} could not be read ({listed}); {fate}"


@dataclass(frozen=True)
class Cell:
    """What stands in a table."""

    text: str
    value: float | None = None  # that it sorts by
    interval: str = ""  # a second line
    best: bool = False  # in bold
    colour: int | None = None  # of a model


@dataclass(frozen=True)
class Table:
    """A table that can be sorted.

    The first ``n_texts`` columns are texts, the others numbers.
    """

    id: str
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    n_texts: int = 2


class _Column(NamedTuple):
    """A column of ``tables.json``."""

    key: str
    header: str
    form: str
    better: int  # 1: higher is better, -1: lower, 0: neither


class _Line(NamedTuple):
    """One model on one set."""

    set: str
    model: str
    numbers: Numbers


def result_tables(results: Results, colours: Mapping[str, int]) -> list[Table]:
    """The tables that have something to show; a line is one set and one model, grouped
    by set.
    """
    tables = [_table(section, results["rows"], colours) for section in _TABLES]
    tables.append(_differences(results["differences"], colours))
    return [table for table in tables if table.rows]


def _table(section: Section, rows: Sequence[Row], colours: Mapping[str, int]) -> Table:
    """The table of a section, with the columns that some line has a value for."""
    lines = _lines(section, rows)
    columns = [_Column(*words) for words in _TABLES[section]["columns"]]
    columns = [column for column in columns if _is_used(column, lines)]
    body = []
    for line in lines:
        peers = [other for other in lines if other.set == line.set]
        cells = [Cell(line.set), Cell(line.model, colour=colours[line.model])]
        body.append(cells + [_cell(line, column, peers) for column in columns])
    headers = ["Set", "Model", *(column.header for column in columns)]
    caption = _TABLES[section]["caption"]
    return Table(section, caption, headers, body)


def _lines(section: Section, rows: Sequence[Row]) -> list[_Line]:
    """The lines of a section's table, grouped by set."""
    return [
        _Line(name, row["model"], row[section][name])
        for name, row in itertools.product(set_names(rows, section), rows)
        if name in row.get(section, {})
    ]


def _is_used(column: _Column, lines: Sequence[_Line]) -> bool:
    return any(line.numbers.get(column.key) is not None for line in lines)


def _cell(line: _Line, column: _Column, peers: Sequence[_Line]) -> Cell:
    """A number; the best of a set is in bold, if at least two models differ."""
    value = line.numbers.get(column.key)
    # a median rank is infinite where half is unreadable
    if value is None or not math.isfinite(value):
        return Cell(MISSING)
    write = _FORMS[column.form]
    interval = line.numbers.get(f"{column.key}_interval") or ()
    is_best = False
    if column.better:
        scores = [column.better * peer.numbers[column.key] for peer in peers]
        differ = min(scores) < max(scores)
        is_best = differ and column.better * value == max(scores)
    return Cell(write(value), value, " – ".join(map(write, interval)), is_best)


def _differences(entries: Sequence[Difference], colours: Mapping[str, int]) -> Table:
    """Every paired difference with its interval, in bold if that is clear of zero."""
    body = []
    for entry in entries:
        low, value, high = (entry[key] for key in ("low", "difference", "high"))
        interval = f"{points(low)} to {points(high)}"
        model, baseline = entry["model"], entry["baseline"]
        body.append(
            [
                Cell("mean of the sets" if entry["set"] is None else entry["set"]),
                Cell(model, colour=colours[model]),
                Cell(baseline, colour=colours[baseline]),
                Cell(METRICS[entry["metric"]]),
                Cell(points(value), value, interval, low > 0 or high < 0),
            ]
        )
    caption = "Differences, sample by sample; in bold what is clear of zero"
    headers = ["Set", "Model", "Minus", "Measure", "Difference, points"]
    return Table("differences", caption, headers, body, n_texts=4)
