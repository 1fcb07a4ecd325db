"""The tables of the report: which numbers of results.json stand in them, and where. No HTML here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloob.evaluation.report.numbers import (
    METRICS,
    MISSING,
    Row,
    count,
    decimal,
    duration,
    interval,
    number,
    part,
    percent,
    points,
    set_names,
)


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the number it sorts by, a second line, and whether it is the best of its set."""

    text: str
    value: float | None = None
    interval: str = ""
    best: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Table:
    """A sortable table; ``numeric[i]`` says whether column i holds numbers.

    ``groups`` are (heading or "", number of columns) over the headers, and empty where no columns belong together.
    """

    id: str
    caption: str
    groups: tuple[tuple[str, int], ...]
    headers: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class _Column:
    """How one number of a result is shown. ``better`` is +1 (higher), −1 (lower) or 0 (no winner marked)."""

    key: str
    header: str
    form: Callable[[float | None], str]
    better: int = 0
    always: bool = True
    group: str = ""


_ZEROSHOT = (
    _Column("acc1", "Top-1, %", percent, 1),
    _Column("acc5", "Top-5, %", percent, 1),
    _Column("mean_per_class_recall", "Mean per class,\u00a0%", percent, 1, always=False),
    _Column("n_classes", "Classes", count, always=False),
    _Column("n", "Images", count, always=False),
)
_PROBE = (
    _Column("acc1", "Top-1, %", percent, 1),
    _Column("acc5", "Top-5, %", percent, 1),
    _Column("mean_per_class_recall", "Mean per class,\u00a0%", percent, 1, always=False),
    _Column("shots", "Images a class", count, always=False),
    _Column("n_train", "Training images", count, always=False),
    _Column("n", "Test images", count, always=False),
)
_RETRIEVAL = (
    *(_Column(f"image_to_text@{k}", f"@{k}", percent, 1, group="Image → text recall, %") for k in (1, 5, 10)),
    *(_Column(f"text_to_image@{k}", f"@{k}", percent, 1, group="Text → image recall, %") for k in (1, 5, 10)),
    _Column("image_to_text_median_rank", "image → text", count, -1, always=False, group="Median rank"),
    _Column("text_to_image_median_rank", "text → image", count, -1, always=False, group="Median rank"),
    _Column("n_images", "Images", count, always=False),
    _Column("n", "Texts", count, always=False),
)
_GEOMETRY = (
    _Column("effective_eigenvalues_image", "image", count, group="Effective eigenvalues"),
    _Column("effective_eigenvalues_text", "text", count, group="Effective eigenvalues"),
    *(
        _Column(
            f"effective_eigenvalues_{side}_retrieved", f"{side}, retrieved", count, 0, False, "Effective eigenvalues"
        )
        for side in ("image", "text")
    ),
    _Column("ajne_image", "image", decimal, group="Ajne"),
    _Column("ajne_text", "text", decimal, group="Ajne"),
    _Column("modality_gap", "Modality gap", decimal),
    _Column("train_seconds", "Training time", duration),
    _Column("alignment", "Alignment", decimal, always=False),
    _Column("uniformity_image", "image", decimal, always=False, group="Uniformity"),
    _Column("uniformity_text", "text", decimal, always=False, group="Uniformity"),
    _Column("saturation", "InfoNCE saturation", decimal, always=False),
    _Column("n", "Pairs", count, always=False),
)


def result_tables(rows: Sequence[Row], colours: Mapping[str, int]) -> list[Table]:
    """The result tables that have something to show: zero-shot, probe, retrieval, geometry with the training time.

    A line of a table is one set and one model, grouped by set; sets keep the order of their first appearance.
    """
    parts = [
        _table("zeroshot", "Zero-shot classification", _ZEROSHOT, rows, colours),
        _table("probe", "Linear probe", _PROBE, rows, colours),
        _table("retrieval", "Retrieval", _RETRIEVAL, rows, colours),
        _table("geometry", "Geometry of the embeddings, and cost", _GEOMETRY, rows, colours),
    ]
    return [table for table in parts if table.rows]


def differences(results: Mapping[str, Any], colours: Mapping[str, int]) -> Table | None:
    """Every paired difference of results.json with its interval; the number in bold where that is clear of zero."""
    body = []
    for entry in results.get("differences", ()):
        value, low, high = (entry[key] for key in ("difference", "low", "high"))
        clear = low > 0 or high < 0
        body.append(
            (
                Cell("mean of the sets" if entry["set"] is None else entry["set"]),
                *(Cell(entry[key], colour=colours[entry[key]]) for key in ("model", "baseline")),
                Cell(METRICS[entry["metric"]]),
                Cell(points(value), value, f"{points(low)} to {points(high)}", best=clear),
                Cell("yes" if clear else "no"),
            )
        )
    if not body:
        return None
    headers = ("Set", "Model", "Minus", "Measure", "Difference, points", "Clear of zero")
    numeric = (False, False, False, False, True, False)
    return Table("differences", "Differences, image by image", (), headers, numeric, tuple(body))


def _table(
    key: str,
    caption: str,
    columns: Sequence[_Column],
    rows: Sequence[Row],
    colours: Mapping[str, int],
) -> Table:
    """Lays out one part of results.json; see ``result_tables``."""
    lines: list[tuple[str, str, Mapping[str, Any]]] = []
    for name in set_names(rows, key):
        lines += [
            (name, row["model"], {**part(row, key)[name], "train_seconds": row.get("train_seconds")})
            for row in rows
            if name in part(row, key)
        ]
    if key == "geometry":  # the training time is worth a line even where no geometry was measured
        lines += [
            (MISSING, row["model"], {"train_seconds": row["train_seconds"]})
            for row in rows
            if not part(row, key) and number(row.get("train_seconds")) is not None
        ]
    some = {column.key for column in columns for line in lines if number(line[2].get(column.key)) is not None}
    columns = [column for column in columns if column.always or column.key in some]
    best = _best(lines, columns)
    body = []
    for i, (name, model, values) in enumerate(lines):
        cells = [Cell(name), Cell(model, colour=colours[model])]
        for column in columns:
            value = number(values.get(column.key))
            pair = interval(values.get(f"{column.key}_interval"))
            span = f"{column.form(pair[0])} – {column.form(pair[1])}" if pair else ""
            cells.append(Cell(column.form(value), value, span, best=(i, column.key) in best))
        body.append(tuple(cells))
    headers = ("Set", "Model", *(c.header for c in columns))
    numeric = (False, False, *(True for _ in columns))
    return Table(key, caption, _groups(columns), headers, numeric, tuple(body))


def _groups(columns: Sequence[_Column]) -> tuple[tuple[str, int], ...]:
    """Headings over neighbouring columns, with the two columns that name the set and the model before them."""
    if not any(column.group for column in columns):
        return ()
    runs = [(group, len(list(run))) for group, run in itertools.groupby(columns, lambda column: column.group)]
    return (("", 2), *runs)


def _best(lines: Sequence[tuple[str, str, Mapping[str, Any]]], columns: Sequence[_Column]) -> set[tuple[int, str]]:
    """(line, column) of the best number of each set, where at least two models differ."""
    result = set()
    for column in (c for c in columns if c.better):
        groups: dict[str, list[tuple[int, float]]] = {}
        for i, (name, _, values) in enumerate(lines):
            value = number(values.get(column.key))
            if value is not None:
                groups.setdefault(name, []).append((i, value))
        for group in groups.values():
            top = max(column.better * value for _, value in group)
            winners = [i for i, value in group if column.better * value == top]
            if len(winners) < len(group):
                result |= {(i, column.key) for i in winners}
    return result
