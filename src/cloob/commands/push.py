"""``cloob push``: a model to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.commands.arguments import parse
from cloob.commands.exporting import PushArguments
from cloob.errors import InputError


def main(words: Sequence[str]) -> int:
    """Pushes one model; exit code 1 when the hub does not take it."""
    arguments = parse(PushArguments, words, "cloob push")
    if arguments.license is None:
        raise InputError(
            "--license is missing: under what may others use the weights? mit, apache-2.0, cc-by-4.0, other, …"
        )
    from cloob.commands.work.push import run  # torch: only for words that are right

    return run(arguments)
