"""``cloob embed``: vectors of pictures in one file."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.commands.arguments import check_amounts, check_out, parse
from cloob.commands.classify import check_source
from cloob.commands.finding import EmbedArguments
from cloob.errors import InputError

SUFFIXES = (".npz", ".safetensors", ".parquet")


def main(words: Sequence[str]) -> int:
    """Embeds; 1 where a picture could not be read."""
    arguments = parse(EmbedArguments, words, "cloob embed")
    check_amounts(1, arguments.workers)
    check_out("--out", arguments.out, SUFFIXES, [arguments.source])
    if arguments.out.exists() and not arguments.overwrite:
        raise InputError(f"{arguments.out}: exists; --overwrite replaces it")
    check_source(arguments.source, arguments.model)
    from cloob.commands.work.embed import run  # torch: only for words that are right

    return run(arguments)
