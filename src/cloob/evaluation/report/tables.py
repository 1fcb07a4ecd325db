"""The tables of the report: which numbers of the results they show, and where. No HTML here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cloob.evaluation.report.numbers import (
    METRICS,
    MISSING,
    Row,
    count,
    decimal,
    duration,
    number,
    part,
    percent,
    points,
    set_names,
)


class Cell(NamedTuple):
    """Its text, the number it sorts by, a second line, whether it is the best of its set, and a model's colour."""

    text: str
    value: float | None = None
    interval: str = ""
    best: bool = False
    colour: int | None = None


class Table(NamedTuple):
    """A sortable table; ``groups`` are (heading or "", number of columns) over the headers, empty without headings."""

    id: str
    caption: str
    groups: list[tuple[str, int]]
    headers: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]


class _Column(NamedTuple):
    """A number of a result; ``better`` is +1 (higher), −1 (lower) or 0. Unless ``always``, some line must have it."""

    key: str
    header: str
    form: Callable[[float | None], str] = count
    better: int = 0
    group: str = ""
    always: bool = False


_ACCURACIES = [
    _Column("acc1", "Top-1, %", percent, 1),
    _Column("acc5", "Top-5, %", percent, 1),
    _Column("mean_per_class_recall", "Mean per class,\u00a0%", percent, 1),
]
_PROBE = [_Column("shots", "Images a class"), _Column("n_train", "Training images"), _Column("n", "Test images")]
_COLUMNS = {
    "zeroshot": [*_ACCURACIES, _Column("n_classes", "Classes"), _Column("n", "Images")],
    "probe": [*_ACCURACIES, *_PROBE],
    "retrieval": [
        *(_Column(f"image_to_text@{k}", f"@{k}", percent, 1, "Image → text recall, %") for k in (1, 5, 10)),
        *(_Column(f"text_to_image@{k}", f"@{k}", percent, 1, "Text → image recall, %") for k in (1, 5, 10)),
        _Column("image_to_text_median_rank", "image → text", count, -1, "Median rank"),
        _Column("text_to_image_median_rank", "text → image", count, -1, "Median rank"),
        _Column("n_images", "Images"),
        _Column("n", "Texts"),
    ],
    "geometry": [
        _Column("effective_eigenvalues_image", "image", group="Effective eigenvalues", always=True),
        _Column("effective_eigenvalues_text", "text", group="Effective eigenvalues", always=True),
        _Column("effective_eigenvalues_image_retrieved", "image, retrieved", group="Effective eigenvalues"),
        _Column("effective_eigenvalues_text_retrieved", "text, retrieved", group="Effective eigenvalues"),
        _Column("ajne_image", "image", decimal, group="Ajne", always=True),
        _Column("ajne_text", "text", decimal, group="Ajne", always=True),
        _Column("modality_gap", "Modality gap", decimal, always=True),
        _Column("train_seconds", "Training time", duration, always=True),
        _Column("alignment", "Alignment", decimal),
        _Column("uniformity_image", "image", decimal, group="Uniformity"),
        _Column("uniformity_text", "text", decimal, group="Uniformity"),
        _Column("saturation", "InfoNCE saturation", decimal),
        _Column("n", "Pairs"),
    ],
}
_CAPTIONS = {
    "zeroshot": "Zero-shot classification",
    "probe": "Linear probe",
    "retrieval": "Retrieval",
    "geometry": "Geometry of the embeddings, and cost",
}

_Line = tuple[str, str, Mapping[str, Any]]  # set, model, numbers


def result_tables(rows: Sequence[Row], colours: Mapping[str, int]) -> list[Table]:
    """The tables that have something to show; a line is one set and one model, grouped by set."""
    tables = [_table(key, rows, colours) for key in _CAPTIONS]
    return [table for table in tables if table.rows]


def difference_table(results: Mapping[str, Any], colours: Mapping[str, int]) -> Table | None:
    """Every paired difference with its interval, in bold if that is clear of zero."""
    body = []
    for entry in results.get("differences", ()):
        value, low, high = (entry[key] for key in ("difference", "low", "high"))
        clear = low > 0 or high < 0
        body.append(
            [
                Cell("mean of the sets" if entry["set"] is None else entry["set"]),
                *(Cell(entry[key], colour=colours[entry[key]]) for key in ("model", "baseline")),
                Cell(METRICS[entry["metric"]]),
                Cell(points(value), value, f"{points(low)} to {points(high)}", best=clear),
                Cell("yes" if clear else "no"),
            ]
        )
    headers = ["Set", "Model", "Minus", "Measure", "Difference, points", "Clear of zero"]
    numeric = [header == "Difference, points" for header in headers]
    return Table("differences", "Differences, image by image", [], headers, numeric, body) if body else None


def _table(key: str, rows: Sequence[Row], colours: Mapping[str, int]) -> Table:
    lines: list[_Line] = [
        (name, row["model"], {**part(row, key)[name], "train_seconds": row.get("train_seconds")})
        for name in set_names(rows, key)
        for row in rows
        if name in part(row, key)
    ]
    if key == "geometry":  # the training time is worth a line even without a geometry
        timed = [row for row in rows if not part(row, key) and row.get("train_seconds") is not None]
        lines += [(MISSING, row["model"], row) for row in timed]
    some = {column.key for column in _COLUMNS[key] for line in lines if number(line[2].get(column.key)) is not None}
    columns = [column for column in _COLUMNS[key] if column.always or column.key in some]
    best = _best(lines, columns)
    body = []
    for i, (name, model, values) in enumerate(lines):
        cells = [Cell(name), Cell(model, colour=colours[model])]
        for column in columns:
            value, ends = number(values.get(column.key)), values.get(f"{column.key}_interval")
            span = " – ".join(map(column.form, ends)) if ends else ""
            cells.append(Cell(column.form(value), value, span, best=(i, column.key) in best))
        body.append(cells)
    headers = ["Set", "Model", *(column.header for column in columns)]
    return Table(key, _CAPTIONS[key], _groups(columns), headers, [i > 1 for i in range(len(headers))], body)


def _groups(columns: Sequence[_Column]) -> list[tuple[str, int]]:
    """Headings over neighbouring columns; the first two columns name the set and the model."""
    if not any(column.group for column in columns):
        return []
    runs = itertools.groupby(columns, lambda column: column.group)
    return [("", 2), *((group, len(list(run))) for group, run in runs)]


def _best(lines: Sequence[_Line], columns: Sequence[_Column]) -> set[tuple[int, str]]:
    """(line, column) of the best number of each set, if at least two models differ."""
    best = set()
    for column in (column for column in columns if column.better):
        groups: dict[str, list[tuple[int, float]]] = {}
        for i, (name, _, values) in enumerate(lines):
            if (value := number(values.get(column.key))) is not None:
                groups.setdefault(name, []).append((i, column.better * value))
        for group in groups.values():
            winners = [i for i, value in group if value == max(value for _, value in group)]
            if len(winners) < len(group):
                best |= {(i, column.key) for i in winners}
    return best
