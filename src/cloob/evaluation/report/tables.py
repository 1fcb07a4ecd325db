"""How the report writes numbers, which of them its tables show, and what it says is missing. No HTML here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""One model in the results of ``cloob.evaluate``."""

MISSING = "–"
METRICS = {
    "acc1": "zero-shot top-1",
    "probe_acc1": "linear probe top-1",
    "image_to_text@1": "image → text recall@1",
    "text_to_image@1": "text → image recall@1",
    **{f"{one}_to_{other}@{k}": f"recall@{k}, {one} → {other}" for one, other in ("ab", "ba") for k in (1, 5, 10)},
}


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
    return (text if value == 0 or abs(value) >= 0.0005 else f"{value:.1e}").replace("-", "−")


def count(value: float) -> str:
    """A whole number with thin spaces (12345 -> ``12 345``); others with one decimal."""
    return (f"{value:,.0f}" if value == int(value) else f"{value:,.1f}").replace(",", "\u202f")


def duration(value: float) -> str:
    """Seconds for people: ``5.2 s``, ``3 min 12 s``, ``2 h 5 min``, with no line break before a unit."""
    if value < 10:
        return f"{value:.1f}\u00a0s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours}\u00a0h {minutes_left}\u00a0min"
    return f"{minutes}\u00a0min {seconds}\u00a0s" if minutes else f"{seconds}\u00a0s"


class Problem(NamedTuple):
    """What happened to a set (None: the model did not load) with a model (None: with all of them)."""

    set: str | None
    model: str | None
    message: str


# Part of a row -> what its unreadable samples are, the numbers that add up to the total, and what becomes of them.
_PARTS = {
    "zeroshot": ("images", ("n",), "they count as wrong"),
    "retrieval": ("images or captions", ("n_images", "n"), "they count as not found"),
    "geometry": ("images or captions", (), "they are in no measure"),
    "vectors": ("rows", (), "they are in no measure"),
}


def problems(results: Mapping[str, Any]) -> dict[str, list[Problem]]:
    """``missing`` sets, ``unloaded`` models, ``failed`` measurements and ``unreadable`` samples."""
    found: dict[str, list[Problem]] = {"missing": [], "unloaded": [], "failed": []}
    for entry in results.get("failures", ()):
        name, model = entry["set"], entry["model"]
        kind = "missing" if model is None else "unloaded" if name is None else "failed"
        error = entry["error"].removeprefix(f"{name}: ").removeprefix(f"{model}: ")
        found[kind].append(Problem(name, model, error))
    return {**found, "unreadable": _unreadable(results["rows"])}


def _unreadable(rows: Sequence[Row]) -> list[Problem]:
    """What all models could not read is listed once."""
    models: dict[tuple[str, str], list[str | None]] = {}
    for row in rows:
        for key, (what, totals, fate) in _PARTS.items():
            for name, values in row.get(key, {}).items():
                if counts := values.get("unreadable"):
                    of = f" of {count(sum(values[total] for total in totals))}" if totals else ""
                    reasons = ", ".join(f"{reason} × {n}" for reason, n in sorted(counts.items()))
                    message = f"{count(sum(counts.values()))}{of} {what} could not be read ({reasons}); {fate}"
                    models.setdefault((name, message), []).append(row["model"])
    return [
        Problem(name, model, message)
        for (name, message), some in models.items()
        for model in ([None] if len(some) == len(rows) else some)
    ]


class Cell(NamedTuple):
    """Its text, the number it sorts by, a second line, whether it is the best of its set, and a model's colour."""

    text: str
    value: float | None = None
    interval: str = ""
    best: bool = False
    colour: int | None = None


class _Column(NamedTuple):
    """A number of a result; ``better`` is +1 (higher), −1 (lower) or 0."""

    key: str
    header: str
    form: Callable[[float], str] = count
    better: int = 0
    group: str = ""


_SIDES = ("image", "text", "a", "b")
_ACCURACIES = [
    _Column("acc1", "Top-1, %", percent, 1),
    _Column("acc5", "Top-5, %", percent, 1),
    _Column("mean_per_class_recall", "Mean per class,\u00a0%", percent, 1),
]
_COLUMNS = {
    "zeroshot": [*_ACCURACIES, _Column("n_classes", "Classes"), _Column("n", "Images")],
    "probe": [
        *_ACCURACIES,
        *(_Column("shots", "Images a class"), _Column("n_train", "Training images"), _Column("n", "Test images")),
    ],
    "retrieval": [
        *(_Column(f"image_to_text@{k}", f"@{k}", percent, 1, "Image → text recall, %") for k in (1, 5, 10)),
        *(_Column(f"text_to_image@{k}", f"@{k}", percent, 1, "Text → image recall, %") for k in (1, 5, 10)),
        _Column("image_to_text_median_rank", "image → text", count, -1, "Median rank"),
        _Column("text_to_image_median_rank", "text → image", count, -1, "Median rank"),
        *(_Column("n_images", "Images"), _Column("n", "Texts")),
    ],
    "vectors": [
        *(
            _Column(f"{one}_to_{other}@{k}", f"@{k}", percent, 1, f"{one} → {other} recall, %")
            for one, other in ("ab", "ba")
            for k in (1, 5, 10)
        ),
        *(_Column(f"chance@{k}", f"@{k}", percent, 0, "Chance, %") for k in (1, 5, 10)),
        _Column("a_to_b_median_rank", "a → b", count, -1, "Median rank"),
        _Column("b_to_a_median_rank", "b → a", count, -1, "Median rank"),
        *(_Column("n_ids", "Ids"), _Column("n", "Pairs")),
    ],
    "geometry": [
        *(
            _Column(
                f"effective_eigenvalues_{side}{also}", side + also.replace("_", ", "), group="Effective eigenvalues"
            )
            for also in ("", "_retrieved")
            for side in _SIDES
        ),
        *(_Column(f"ajne_{side}", side, decimal, group="Ajne") for side in _SIDES),
        _Column("modality_gap", "Modality gap", decimal),
        _Column("train_seconds", "Training time", duration),
        _Column("alignment", "Alignment", decimal),
        *(_Column(f"uniformity_{side}", side, decimal, group="Uniformity") for side in _SIDES),
        *(_Column("saturation", "InfoNCE saturation", decimal), _Column("n", "Pairs")),
    ],
}
_CAPTIONS = {
    "zeroshot": "Zero-shot classification",
    "probe": "Linear probe",
    "retrieval": "Retrieval",
    "vectors": "Retrieval",
    "geometry": "Geometry of the embeddings, and cost",
}

_Line = tuple[str, str, Mapping[str, Any]]  # set, model, numbers


def result_tables(results: Mapping[str, Any], colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """The sortable tables that have something to show; a line is one set and one model, grouped by set.

    ``groups`` are (heading or "", number of columns) over the headers, empty without headings.
    """
    rows = results["rows"]
    tables = [_table(key, rows, colours) for key in _COLUMNS if set_names(rows, key)]
    return [*tables, _differences(results, colours)] if results.get("differences") else tables


def _differences(results: Mapping[str, Any], colours: Mapping[str, int]) -> dict[str, Any]:
    """Every paired difference with its interval, in bold if that is clear of zero."""
    body = []
    for entry in results["differences"]:
        low, high = points(entry["low"]), points(entry["high"])
        clear = entry["low"] > 0 or entry["high"] < 0
        models = [Cell(entry[key], colour=colours[entry[key]]) for key in ("model", "baseline")]
        gap = Cell(points(entry["difference"]), entry["difference"], f"{low} to {high}", best=clear)
        of = Cell("mean of the sets" if entry["set"] is None else entry["set"]), *models, Cell(METRICS[entry["metric"]])
        body.append([*of, gap, Cell("yes" if clear else "no")])
    headers = ["Set", "Model", "Minus", "Measure", "Difference, points", "Clear of zero"]
    table = {"id": "differences", "caption": "Differences, sample by sample", "groups": []}
    return {**table, "headers": headers, "numeric": [i == 4 for i in range(6)], "rows": body}


def _table(key: str, rows: Sequence[Row], colours: Mapping[str, int]) -> dict[str, Any]:
    lines: list[_Line] = [
        (name, row["model"], row[key][name] | {"train_seconds": row.get("train_seconds")})
        for name in set_names(rows, key)
        for row in rows
        if name in row.get(key, {})
    ]
    columns = [column for column in _COLUMNS[key] if any(line[2].get(column.key) is not None for line in lines)]
    best = {(i, column.key) for column in columns if column.better for i in _best(lines, column)}
    body = []
    for i, (name, model, values) in enumerate(lines):
        cells = [Cell(name), Cell(model, colour=colours[model])]
        for column in columns:
            value, ends = values.get(column.key), values.get(f"{column.key}_interval")
            if value is None or not math.isfinite(value):  # a median rank where half is unreadable
                cells.append(Cell(MISSING))
                continue
            span = " – ".join(map(column.form, ends)) if ends else ""
            cells.append(Cell(column.form(value), value, span, best=(i, column.key) in best))
        body.append(cells)
    headers = ["Set", "Model", *(column.header for column in columns)]
    groups: list[tuple[str, int]] = []
    if any(column.group for column in columns):
        runs = itertools.groupby(columns, lambda column: column.group)
        groups = [("", 2), *((group, len(list(run))) for group, run in runs)]
    table = {"id": key, "caption": _CAPTIONS[key], "groups": groups}
    return {**table, "headers": headers, "numeric": [i > 1 for i in range(len(headers))], "rows": body}


def _best(lines: Sequence[_Line], column: _Column) -> list[int]:
    """The lines with the best number of each set, if at least two models differ."""
    best = []
    for _, group in itertools.groupby(range(len(lines)), lambda i: lines[i][0]):
        scores = {i: column.better * lines[i][2][column.key] for i in group}
        if min(scores.values()) < max(scores.values()):
            best += [i for i, score in scores.items() if score == max(scores.values())]
    return best
