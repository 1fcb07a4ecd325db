"""``cloob push``: a model to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.commands.arguments import parse
from cloob.commands.exporting import PushArguments, check_repository, spelled
from cloob.errors import InputError
from cloob.export.exported import check_packages


def main(words: Sequence[str]) -> int:
    """Pushes one model; exit code 1 when the hub does not take it."""
    arguments = parse(PushArguments, words, "cloob push")
    check_repository(arguments.repository)
    licence = spelled(arguments.license)
    if licence is None:
        raise InputError("--license is missing: mit, apache-2.0, cc-by-4.0, other, or another that the hub knows")
    check_packages("transformers")
    from cloob.commands.work.push import run  # torch: only for words that are right

    return run(arguments, licence)
