"""How the page of figures writes numbers, ratios and machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_WORDS = {
    "cpu": "{}",
    "cores": "{} cores",
    "threads": "{} threads",
    "threads_a_rank": "threads a rank: {}",
    "load_average": "load {}",
    "load": "load {}",
    "pairs": "{} pairs",
    "dim": "D = {}",
    "batch": "batch {}",
    "batch_size": "batch {}",
    "warm": "{} steps before",
    "steps": "{} steps counted",
}
_LOADS = ("load_average", "load")


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".")


def megabytes(value: float) -> str:
    """Bytes as MB (10⁶ bytes)."""
    return number(value / 1e6)


def beside(shown: str, ratio: float | None) -> str:
    """A figure, and what it is of another one."""
    return shown if ratio is None else f"{shown} ({ratio:.2f})"


def words(about: Mapping[str, Any]) -> str:
    """A machine as its record names it: kind, versions, and what a run was given."""
    parts = []
    for key, value in about.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, bool):
            parts += [key] if value else []
        elif isinstance(value, float):
            parts.append(_WORDS.get(key, f"{_plain(key)} {{}}").format(f"{value:.3g}"))
        else:
            parts.append(_WORDS.get(key, f"{_plain(key)} {{}}").format(shown))
    return ", ".join(parts)


def machines(found: Sequence[Mapping[str, Any]]) -> str:
    """The machines of some rows: one, but for its load, or all of them."""
    apart = [{key: value for key, value in about.items() if key not in _LOADS} for about in found]
    if any(about != apart[0] for about in apart):
        return "; ".join(dict.fromkeys(map(words, found)))
    loads = sorted(about[key] for about in found for key in _LOADS if key in about)
    if not loads:
        return words(apart[0])
    span = f"{loads[0]:.3g}" if loads[0] == loads[-1] else f"{loads[0]:.3g} to {loads[-1]:.3g}"
    return f"{words(apart[0])}, load {span}"


def _plain(key: str) -> str:
    return key.replace("_", " ")
