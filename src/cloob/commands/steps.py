"""What a command says at its end: the one or two commands that come next, ready to be copied."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path


def say_next(*commands: Sequence[str | Path]) -> None:
    """Prints each command on a line of its own, quoted for a shell; on stderr, as output may be read by a program.

    Args:
        commands: The words after ``cloob``.
    """
    for i, words in enumerate(commands):
        print(f"{'next:' if i == 0 else '  or:'} {shell(words)}", file=sys.stderr)


def shell(words: Sequence[str | Path]) -> str:
    """A command of ours as one line for a shell."""
    return shlex.join(["cloob", *map(str, words)])


def columns(image_column: str, caption_column: str) -> list[str | Path]:
    """The options of a table's columns, where they are not the default."""
    words: list[str | Path] = []
    for option, value, default in (
        ("--image-column", image_column, "filepath"),
        ("--caption-column", caption_column, "title"),
    ):
        words += [option, value] if value != default else []
    return words
