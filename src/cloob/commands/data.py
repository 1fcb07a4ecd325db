"""``cloob data``: looks at a set of pairs, or counts its shards."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.commands.arguments import HTML, check_out, parse
from cloob.commands.measuring import DataArguments
from cloob.errors import InputError


def main(words: Sequence[str]) -> int:
    """Looks or counts, and prints what was found."""
    arguments = parse(DataArguments, words, "cloob data")
    for name, least in (("most", 0), ("pictures", 1), ("workers", 1)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name} is {getattr(arguments, name)}; {least} or more is wanted")
    if arguments.out is not None:
        check_out("--out", arguments.out, (".json",) if arguments.count else HTML)
    arguments.cache.use()
    from cloob.commands.work.data import run  # pyarrow and torch: only for words that are right

    return run(arguments)
