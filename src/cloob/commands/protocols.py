"""What ``match`` and ``train`` print of how well true partners are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES = {"@": "recall@", "_mrr": "MRR", "_choose_": "choose 1 of ", "_": ""}
WIDTH = 24  # of a column


def print_numbers(numbers: Mapping[str, Any]) -> None:
    """Prints a line for every number of ``cloob.functional.protocols``, with its
    interval and what chance reaches; all but ranks in percent.
    """
    ways = [way for way in ("a_to_b", "b_to_a") if f"{way}_mrr" in numbers]
    heads = [way.replace("_to_", " → ") for way in ways]
    over = f" over {numbers['n_groups']:,} groups" if "n_groups" in numbers else ""
    print(f"of {numbers['n_ids']:,} ids, in % (95 % intervals{over}):")
    print(line("", [*heads, "chance"]))
    for key in numbers:
        end = key.removeprefix(ways[0])
        if end != key and not end.endswith("_interval"):
            cells = [cell(numbers, f"{way}{end}") for way in ways]
            print(line(title(end), [*cells, cell(numbers, f"chance{end}")]))


def line(name: str, cells: list[str]) -> str:
    columns = [f"{name:18}", *(f"{text:{WIDTH}}" for text in cells)]
    return "".join(columns).rstrip()


def title(end: str) -> str:
    """``recall@1`` for ``@1``."""
    start = next(start for start in TITLES if end.startswith(start))
    return TITLES[start] + end.removeprefix(start).replace("_", " ")


def cell(numbers: Mapping[str, Any], key: str) -> str:
    """``41.2 (38.0 to 44.1)``."""
    unit, digits = (1, ".0f") if key.endswith("_median_rank") else (100, ".1f")
    text = f"{unit * numbers[key]:{digits}}"
    interval = numbers.get(f"{key}_interval")
    if interval is None:
        return text
    low, high = (f"{unit * end:{digits}}" for end in interval)
    return f"{text} ({low} to {high})"
