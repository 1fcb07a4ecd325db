"""``cloob classify``: sorts pictures by names of classes, or by examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cloob.commands.arguments import check_amounts, check_out, parse
from cloob.commands.finding import ClassifyArguments, read_labels
from cloob.commands.search import INDEX_FILE
from cloob.errors import InputError
from cloob.models.source import check_source as check_model


def main(words: Sequence[str]) -> int:
    """Sorts; 1 where a picture could not be read or moved."""
    arguments = parse(ClassifyArguments, words, "cloob classify")
    check_amounts(1, arguments.workers)
    _check(arguments)
    check_source(arguments.source, arguments.model)
    from cloob.commands.work.classify import run  # torch: only for words that are right

    return run(arguments, words)


def check_source(source: str, model: str | None) -> None:
    """Raises InputError where a source is not there, or no model would embed it."""
    path = Path(source)
    if "://" in source or (path / INDEX_FILE).is_file():
        return
    if not path.exists() and not any(c in source for c in "*{:"):
        raise InputError(f"{source}: no such file or folder")
    if model is None:
        raise InputError("no model given: --model names a run folder, or NAME/TAG of open_clip")
    check_model(model)


def _check(arguments: ClassifyArguments) -> None:
    """What goes with what."""
    by_head = arguments.examples is not None or arguments.head is not None
    if (arguments.labels is None) is not by_head:
        raise InputError("give --labels cat,dog (or a file of them), or --examples DIR, or --head FILE; one of them")
    if by_head and (arguments.multi or arguments.none or arguments.templates or arguments.inv_tau is not None):
        raise InputError("--multi, --none, --templates and --inv-tau go with --labels: a head gives one label always")
    if arguments.cutoff != ClassifyArguments.cutoff and not (arguments.multi or arguments.none):
        raise InputError("--cutoff is that of --multi and --none; add one of them")
    if arguments.json and arguments.csv:
        raise InputError("--json and --csv: one of them")
    if sum(map(bool, (arguments.move_to, arguments.copy_to, arguments.multi))) > 1:
        raise InputError(
            "--move-to and --copy-to put a file into one folder, --multi gives several labels; one of them"
        )
    if arguments.examples is not None and not arguments.examples.is_dir():
        raise InputError(f"--examples {arguments.examples}: no such folder; one with a folder for each label is wanted")
    if arguments.examples is not None and arguments.head is not None:
        check_out("--head", arguments.head, (".safetensors",))
    if arguments.labels is not None:
        read_labels(arguments.labels)
