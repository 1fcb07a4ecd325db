"""``cloob push``: push a model to the Hugging Face hub, with a card written from its
run.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cloob.commands.console import Positional, arg, as_words, refuse, say_next
from cloob.commands.export import LICENCE, ONE_WORD, REPOSITORY
from cloob.export.exported import check_exportable, check_packages


@dataclass(frozen=True)
class Options:
    """Push a model to the Hugging Face hub: open_clip's files, transformers' where it
    has such towers, and a card.
    """

    source: Annotated[Positional[str], arg(metavar="RUN")]
    """A run or model: what `cloob eval` takes."""
    repository: Annotated[Positional[str], arg(metavar="ORG/NAME")]
    """The repository on the hub; made if missing."""
    license: str | None = None
    """The weights' licence, needed: mit, apache-2.0, cc-by-4.0, … as the hub spells it.
    """
    private: bool = False
    """Let nobody but you or your organisation see a repository that is made."""
    results: Path | None = None
    """A results.json of `cloob eval` for the card; left out, that of the run."""
    dry_run: bool = False
    """List the files and their sizes, and send nothing."""


def run(options: Options) -> int:
    """Writes the repository's files, lists them, and sends them."""
    repository, licence = options.repository, (options.license or "").strip().lower()
    name = f"{repository}: it must be ORG/NAME, of letters, digits, '-', '_' and '.'"
    wrong = f"--license {licence or 'is missing'}: {ONE_WORD}"
    refuse(
        {
            name: not REPOSITORY.fullmatch(repository),
            wrong: not LICENCE.fullmatch(licence),
        }
    )
    check_packages("transformers")
    from cloob.export.card import (
        check_online,
        gather_facts,
        list_files,
        send,
        write_repository,
    )
    from cloob.models.load import load_model

    if not options.dry_run:
        check_online(repository)
    encoder = load_model(options.source, device="cpu")
    check_exportable(encoder.config.kind, options.source)
    facts = gather_facts(options.source, encoder, options.results)
    with tempfile.TemporaryDirectory(prefix="cloob-push-") as temporary:
        folder = Path(temporary)
        without = write_repository(encoder, folder, repository, facts, licence)
        files = list_files(folder)
        for name, size in [*files, ("in all", sum(size for _, size in files))]:
            print(f"{size:>15,}  {name}")
        if without is not None:
            print(f"without files of transformers: {without}")
        if options.dry_run:
            print(f"{repository}: not sent, as --dry-run asks", flush=True)
            more = as_words(options, "private", "results")
            say_next(["push", options.source, repository, "--license", licence, *more])
            return 0
        address = send(folder, repository, private=options.private)
    print(f'{address}\ncloob.load_model("hf-hub:{repository}") loads it', flush=True)
    say_next(["eval", f"hf-hub:{repository}", "--zeroshot", "demo:noto-emoji"])
    return 0
