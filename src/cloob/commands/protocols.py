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
    over = ""
    if "n_groups" in numbers:
        over = f" over {numbers['n_groups']:,} groups"
    print(f"of {numbers['n_ids']:,} ids, in % (95 % intervals{over}):")
    titles = [way.replace("_to_", " → ") for way in ways]
    print(line("", [*titles, "chance"]))
    for key in numbers:
        end = key.removeprefix(ways[0])
        if end == key or end.endswith("_interval"):
            continue
        cells = [cell(numbers, f"{name}{end}") for name in (*ways, "chance")]
        print(line(title(end), cells))


def line(name: str, cells: list[str]) -> str:
    padded = [f"{text:{WIDTH}}" for text in cells]
    return f"{name:18}{''.join(padded)}".rstrip()


def title(end: str) -> str:
    """``recall@1`` for ``@1``."""
    start = next(start for start in TITLES if end.startswith(start))
    rest = end.removeprefix(start).replace("_", " ")
    return f"{TITLES[start]}{rest}"


def cell(numbers: Mapping[str, Any], key: str) -> str:
    """``41.2 (38.0 to 44.1)``."""
    is_rank = key.endswith("_median_rank")

    def words(value: float) -> str:
        return f"{value:.0f}" if is_rank else f"{100 * value:.1f}"

    interval = numbers.get(f"{key}_interval")
    if interval is None:
        return words(numbers[key])
    low, high = interval
    return f"{words(numbers[key])} ({words(low)} to {words(high)})"
