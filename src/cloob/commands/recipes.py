"""``cloob recipes``: the named training set-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloob.commands.arguments import parse


@dataclass(frozen=True)
class RecipesArguments:
    """List the named training set-ups, one line each; `cloob train NAME` runs one."""


def main(words: Sequence[str]) -> int:
    """Prints a line for each recipe."""
    parse(RecipesArguments, words, "cloob recipes")
    from cloob.recipes import list_recipes

    lines = list_recipes()
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {what}" for name, what in lines.items()))
    return 0
