"""``cloob eval``: models side by side on labelled sets and pairs."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.commands.arguments import check_amounts, parse
from cloob.commands.measuring import EvalArguments
from cloob.commands.steps import columns
from cloob.errors import InputError


def main(words: Sequence[str]) -> int:
    """Evaluates; exit code 1 when a part could not be evaluated, with what there is written."""
    arguments = parse(EvalArguments, words, "cloob eval")
    if not arguments.models:
        raise InputError("no model given: name a run folder, or NAME/TAG of open_clip (cloob eval --help)")
    if not (arguments.zeroshot or arguments.retrieval or arguments.suite or arguments.held_out):
        raise InputError(
            "nothing to evaluate on: give --zeroshot DIR …, --suite NAME DIR, --retrieval SOURCE … or --held-out"
        )
    if not arguments.probe and (arguments.shots is not None or arguments.probe_seeds != (0,)):
        raise InputError("--shots and --probe-seeds are those of a linear probe; add --probe")
    if not arguments.retrieval and columns(arguments.image_column, arguments.caption_column):
        raise InputError("--image-column and --caption-column are those of a table; add --retrieval")
    check_amounts(arguments.batch_size, arguments.workers)
    arguments.cache.use()
    from cloob.commands.work.evaluate import run  # torch: only for words that are right

    return run(arguments)
