"""What the report says in numbers: reading and writing them. No HTML here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MISSING = "–"


def number(value: float | None) -> float | None:
    """``value`` as a float; None where it is missing, NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None


def interval(value: Sequence[float] | None) -> tuple[float, float] | None:
    """``value`` as (low, high)."""
    return (value[0], value[1]) if value else None


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


METRICS = {
    "acc1": "zero-shot top-1",
    "probe_acc1": "linear probe top-1",
    "image_to_text@1": "image → text recall@1",
    "text_to_image@1": "text → image recall@1",
}


def part(row: Row, key: str) -> Mapping[str, Mapping[str, Any]]:
    """``row[key]``, set -> numbers; empty where the row has none."""
    return row.get(key) or {}


def set_names(rows: Sequence[Row], key: str) -> list[str]:
    """Names of the sets that any row has under ``key``, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in part(row, key)))
