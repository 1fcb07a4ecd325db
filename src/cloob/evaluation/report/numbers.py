"""How the report writes numbers, and what it says is missing. No HTML here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        found[kind].append(Problem(name, model, entry["error"].removeprefix(f"{name or model}: ")))
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
