"""What left the command line, and what serves instead. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.errors import InputError

COMMANDS = {
    "analyze": "cloob eval RUN --retrieval PAIRS --checkpoints",
    "convert": "cloob export SRC --to cloob --out DEST",
    "models": "cloob find --models, and for towers cloob train --list",
    "push": "cloob export RUN --to transformers --out DIR, then hf upload ORG/NAME DIR",
    "recipes": "cloob train --list",
}
"""Command that left: what to type instead."""

_EVERYWHERE: dict[str, str] = {}
_OPTIONS: dict[str, dict[str, str]] = {}
"""By command: the option that left, and the sentence that says what serves."""


def refuse_removed(command: str, words: Sequence[str]) -> None:
    """Raises InputError for a command or an option that left, with its successor."""
    if command in COMMANDS:
        raise InputError(f"cloob {command} is gone; use {COMMANDS[command]}")
    gone = _EVERYWHERE | _OPTIONS.get(command, {})
    for word in words:
        if word == "--":
            return
        option = word.partition("=")[0]
        if option in gone:
            raise InputError(f"{option} is gone; {gone[option]}")
