"""``cloob models``: the towers by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloob.commands.arguments import parse
from cloob.commands.steps import say_next
from cloob.errors import InputError, nearest
from cloob.models.source import known_models


@dataclass(frozen=True)
class ModelsArguments:
    """List the towers by name; ours first, then open_clip's."""

    contains: str = ""
    """Only names with this in them, in any case."""


def main(words: Sequence[str]) -> int:
    """Prints one name a line."""
    arguments = parse(ModelsArguments, words, "cloob models")
    known = known_models()
    names = [name for name in known if arguments.contains.lower() in name.lower()]
    if not names:
        raise InputError(f"no model has {arguments.contains!r} in its name; {nearest(arguments.contains, known)}")
    print("\n".join(names))
    say_next(["train", "--data", "demo", "--model", names[0]])
    return 0
