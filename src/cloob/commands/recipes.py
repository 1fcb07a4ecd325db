"""``cloob recipes``: list the named training set-ups."""

from __future__ import annotations

from dataclasses import dataclass

from cloob.commands.console import say_next


@dataclass(frozen=True)
class Options:
    """List the named training set-ups, one line each; `cloob train NAME` runs one."""


def run(options: Options) -> int:
    from cloob.recipes import RECIPES, describe

    width = max(map(len, RECIPES))
    print("\n".join(f"{name:<{width}}  {describe(name)}" for name in RECIPES))
    say_next(["train", "align", "--data", "demo"])
    return 0
