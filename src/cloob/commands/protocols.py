"""How well true partners are found, as ``match``, ``train`` and ``eval`` print it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloob.commands.console import print_table

TITLES = {
    "_to_": " → ",
    "@": " recall@",
    "_mrr": " MRR",
    "_choose_": " choose 1 of ",
    "_": " ",
}


def print_numbers(numbers: Mapping[str, Any]) -> None:
    """Prints a line for every number of ``cloob.functional.protocols``, with its
    interval and what chance reaches; all but ranks in percent.
    """
    ways = [way for way in ("a_to_b", "b_to_a") if f"{way}_mrr" in numbers]
    over = ""
    if "n_groups" in numbers:
        over = f" over {numbers['n_groups']:,} groups"
    print(f"of {numbers['n_ids']:,} ids, in % (95 % intervals{over}):")
    lines = [("", [*(way.replace("_to_", " → ") for way in ways), "chance"])]
    for key in numbers:
        end = key.removeprefix(ways[0])
        if end != key and not end.endswith("_interval"):
            cells = [cell(numbers, f"{name}{end}") for name in (*ways, "chance")]
            lines.append((title(end), cells))
    print_table(lines)


def title(key: str) -> str:
    """``a → b recall@1`` for ``a_to_b@1``, ``MRR`` for ``_mrr``."""
    for part, words in TITLES.items():
        key = key.replace(part, words)
    return key.strip()


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
