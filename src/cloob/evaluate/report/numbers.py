"""What the report says in numbers: reading them, writing them, laying them out in tables. No HTML here.

Everything takes the ``rows`` of results.json (DESIGN.md) as plain dictionaries and tolerates what is absent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
MISSING = "–"


def number(value: object) -> float | None:
    """``value`` as a finite float; None for anything that is not one (missing, NaN, text, a list)."""
    if value is None or isinstance(value, (bool, str, bytes)):
        return None
    try:
        result = float(value)  # type: ignore[arg-type]  # numpy and torch scalars are welcome
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def interval(value: object) -> tuple[float, float] | None:
    """``value`` as a (low, high) pair of finite floats, or None."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def percent(value: float | None) -> str:
    """A fraction as a percentage without its sign: 0.172 -> ``17.2``."""
    return MISSING if value is None else f"{100 * value:.1f}".replace("-", "−")


def points(value: float | None) -> str:
    """A difference of fractions in signed percentage points: 0.023 -> ``+2.3``."""
    return MISSING if value is None else f"{100 * value:+z.1f}".replace("-", "−")


def decimal(value: float | None) -> str:
    """Three significant digits or so, never in exponent form for ordinary sizes."""
    if value is None:
        return MISSING
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return (text if value == 0 or abs(value) >= 0.0005 else f"{value:.1e}").replace("-", "−")


def count(value: float | None) -> str:
    """A whole number with thin spaces: 12345 -> ``12 345``; a mean of some with one decimal."""
    if value is None:
        return MISSING
    text = f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    return text.replace(",", "\u202f").replace("-", "−")


def duration(value: float | None) -> str:
    """Seconds as people say them: ``52 s``, ``3 min 12 s``, ``2 h 5 min``; no line breaks before a unit."""
    if value is None:
        return MISSING
    if value < 10:
        return f"{value:.1f}\u00a0s"
    minutes, seconds = divmod(round(value), 60)
    if minutes == 0:
        return f"{seconds}\u00a0s"
    hours, rest = divmod(minutes, 60)
    return f"{hours}\u00a0h {rest}\u00a0min" if hours else f"{minutes}\u00a0min {seconds}\u00a0s"


def shortened(text: str, limit: int = 160) -> str:
    """A text of at most ``limit`` characters, cut between words where it has some, with ``…`` at its end."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head = text[: limit - 1]
    words = head.rpartition(" ")[0]
    return f"{words if len(words) > limit // 2 else head}…"


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


def tables(rows: Sequence[Row], colours: Mapping[str, int]) -> list[Table]:
    """The result tables that have something to show: zero-shot, probe, retrieval, geometry with the training time.

    A line of a table is one set and one model, grouped by set; sets keep the order of their first appearance.
    """
    geometry = _geometry_columns(rows)
    parts = [
        _table("zeroshot", "Zero-shot classification", _ZEROSHOT, rows, colours),
        _table("probe", "Linear probe", _PROBE, rows, colours),
        _table("retrieval", "Retrieval", _RETRIEVAL, rows, colours),
        _table("geometry", "Geometry of the embeddings, and cost", geometry, rows, colours),
    ]
    return [table for table in parts if table.rows]


METRICS = {
    "acc1": "zero-shot top-1",
    "probe_acc1": "linear probe top-1",
    "image_to_text@1": "image → text recall@1",
    "text_to_image@1": "text → image recall@1",
}


def differences(results: Mapping[str, Any], colours: Mapping[str, int]) -> Table | None:
    """Every paired difference of results.json with its interval; the number in bold where that is clear of zero."""
    body = []
    for entry in results.get("differences") or ():
        value, low, high = (number(entry.get(key)) for key in ("difference", "low", "high"))
        if value is None or str(entry.get("model")) not in colours:
            continue
        metric = str(entry.get("metric", "acc1"))
        clear = low is not None and high is not None and (low > 0 or high < 0)
        span = f"{points(low)} to {points(high)}" if low is not None and high is not None else ""
        body.append(
            (
                Cell(str(entry["set"]) if entry.get("set") is not None else "mean of the sets"),
                Cell(str(entry["model"]), colour=colours[str(entry["model"])]),
                Cell(str(entry["baseline"]), colour=colours.get(str(entry["baseline"]))),
                Cell(METRICS.get(metric, metric)),
                Cell(points(value), value, span, best=clear),
                Cell("–" if not span else "yes" if clear else "no"),
            )
        )
    if not body:
        return None
    headers = ("Set", "Model", "Minus", "Measure", "Difference, points", "Clear of zero")
    numeric = (False, False, False, False, True, False)
    return Table("differences", "Differences, image by image", (), headers, numeric, tuple(body))


def _geometry_columns(rows: Sequence[Row]) -> tuple[_Column, ...]:
    """The known columns, then every other scalar that some row has, under its own name."""
    known = {column.key for column in _GEOMETRY}
    extra: dict[str, None] = {}
    for row in rows:
        for values in part(row, "geometry").values():
            extra |= {k: None for k, v in values.items() if k not in known and number(v) is not None}
    more = (_Column(k, k.replace("_", " ").capitalize(), decimal) for k in extra)
    return (*_GEOMETRY, *more)


def part(row: Row, key: str) -> Mapping[str, Mapping[str, Any]]:
    """``row[key]`` as set -> numbers; a set whose value is not a mapping (failed, null) counts as empty."""
    value = row.get(key)
    if not isinstance(value, Mapping):
        return {}
    return {str(k): v if isinstance(v, Mapping) else {} for k, v in value.items()}


def set_names(rows: Sequence[Row], key: str) -> list[str]:
    """Names of the sets that any row has under ``key``, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in part(row, key)))


def _table(
    key: str,
    caption: str,
    columns: Sequence[_Column],
    rows: Sequence[Row],
    colours: Mapping[str, int],
) -> Table:
    """Lays out one part of results.json; see ``tables``."""
    lines: list[tuple[str, str, Mapping[str, Any]]] = []
    for name in set_names(rows, key):
        lines += [
            (name, str(row["model"]), {**part(row, key)[name], "train_seconds": row.get("train_seconds")})
            for row in rows
            if name in part(row, key)
        ]
    if key == "geometry":  # the training time is worth a line even where no geometry was measured
        lines += [
            (MISSING, str(row["model"]), {"train_seconds": row["train_seconds"]})
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
