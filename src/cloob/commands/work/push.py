"""Pushes one model as ``cloob push`` was asked to."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from cloob.commands.exporting import PushArguments
from cloob.commands.steps import say_next
from cloob.errors import InputError
from cloob.export.card import gather_facts
from cloob.export.push import PushFailed, check_online, list_files, send, write_repository
from cloob.models.load import load_model


def run(arguments: PushArguments, licence: str) -> int:
    """Writes the repository's files, lists them, and sends them; returns the exit code."""
    if not arguments.dry_run:
        check_online(arguments.repository)
    encoder = load_model(arguments.source, device="cpu")
    facts = gather_facts(arguments.source, encoder, arguments.results)
    try:
        with tempfile.TemporaryDirectory(prefix="cloob-push-") as temporary:
            folder = Path(temporary)
            without = write_repository(encoder, folder, arguments.repository, facts, licence)
            _list(folder)
            if without is not None:
                print(f"without files of transformers: {without}")
            if arguments.dry_run:
                print(f"{arguments.repository}: not sent, as --dry-run asks", flush=True)
                say_next(_sending(arguments, licence))
                return 0
            address = send(folder, arguments.repository, private=arguments.private)
    except OSError as error:
        place = error.filename or "the files"
        raise InputError(f"{place}: cannot be written ({error.strerror}); TMPDIR names another place") from error
    except PushFailed as error:
        print(f"cloob: {error}", file=sys.stderr)
        return 1
    print(f'{address}\ncloob.load_model("hf-hub:{arguments.repository}") loads it', flush=True)
    say_next(["eval", f"hf-hub:{arguments.repository}", "--zeroshot", "demo:noto-emoji"])
    return 0


def _sending(arguments: PushArguments, licence: str) -> list[str | Path]:
    """The words of the same push, sent."""
    words: list[str | Path] = ["push", arguments.source, arguments.repository, "--license", licence]
    words += ["--private"] if arguments.private else []
    return words if arguments.results is None else [*words, "--results", arguments.results]


def _list(folder: Path) -> None:
    """Prints the files with their sizes, and the sum."""
    files = list_files(folder)
    for name, size in [*files, ("in all", sum(size for _, size in files))]:
        print(f"{size:>15,}  {name}")
