"""``cloob recipes``: the named training set-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloob.commands.arguments import parse
from cloob.commands.steps import say_next
from cloob.recipes import RECIPES, describe


@dataclass(frozen=True)
class RecipesArguments:
    """List the named training set-ups, one line each; `cloob train NAME` runs one."""


def main(words: Sequence[str]) -> int:
    """Prints a line for each recipe."""
    parse(RecipesArguments, words, "cloob recipes")
    width = max(map(len, RECIPES))
    print("\n".join(f"{name:<{width}}  {describe(name)}" for name in RECIPES))
    say_next(["train", "align", "--data", "demo"])
    return 0
