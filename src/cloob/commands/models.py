"""``cloob models``: the towers by name."""

from __future__ import annotations

from dataclasses import dataclass

from cloob.errors import InputError, nearest


@dataclass(frozen=True)
class Options:
    """List the towers by name; ours first, then open_clip's."""

    contains: str = ""
    """Only names with this in them, in any case."""


def run(options: Options) -> int:
    from cloob.commands.terminal import say_next
    from cloob.models.source import known_models

    known = known_models()
    names = [name for name in known if options.contains.lower() in name.lower()]
    if not names:
        raise InputError(f"no model has {options.contains!r} in its name; {nearest(options.contains, known)}")
    print("\n".join(names))
    say_next(["train", "--data", "demo", "--model", names[0]])
    return 0
