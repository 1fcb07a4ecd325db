"""``cloob export``: a model in the format of other programs."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.commands.arguments import parse
from cloob.commands.exporting import ExportArguments, spelled
from cloob.errors import InputError
from cloob.export.exported import check_packages, check_target


def main(words: Sequence[str]) -> int:
    """Exports one model; nothing is written to DEST when it fails."""
    arguments = parse(ExportArguments, words, "cloob export")
    if arguments.to is None:
        raise InputError("--to is missing: transformers, onnx or torch-export (cloob export --help)")
    if arguments.int8 and arguments.to != "onnx":
        raise InputError(f"--int8 is for --to onnx, not for --to {arguments.to}")
    if arguments.eval and not arguments.int8:
        raise InputError("--eval measures what --int8 costs; add --int8, or use `cloob eval`")
    licence = spelled(arguments.license)
    check_target(arguments.source, arguments.target, overwrite=arguments.overwrite)
    check_packages(arguments.to)
    from cloob.commands.work.export import run  # torch: only for words that are right

    return run(arguments, licence)
