"""``cloob analyze``: how the embeddings of runs lie on the sphere, at the end and over their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.commands.arguments import check_amounts, parse
from cloob.commands.measuring import AnalyzeArguments
from cloob.errors import InputError


def main(words: Sequence[str]) -> int:
    """Analyses; exit code 1 when a checkpoint could not be measured, with what there is written."""
    arguments = parse(AnalyzeArguments, words, "cloob analyze")
    if not arguments.models:
        raise InputError("no model given: name a run folder, or NAME/TAG of open_clip (cloob analyze --help)")
    if not 0 < arguments.duplicate <= 1:
        raise InputError(f"duplicate is {arguments.duplicate}; a cosine above 0 and up to 1 is wanted")
    if arguments.similar < 0 or arguments.limit < 2:
        raise InputError("similar must be 0 or more, and limit 2 or more")
    check_amounts(arguments.batch_size, arguments.workers)
    arguments.cache.use()
    from cloob.commands.work.analyze import run  # torch: only for words that are right

    return run(arguments)
