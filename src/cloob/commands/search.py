"""``cloob search``: finds pictures of an index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cloob.commands.arguments import HTML, check_out, parse
from cloob.commands.finding import SearchArguments, read_cutoff
from cloob.errors import InputError

INDEX_FILE = "index.sqlite"

_NUMBER = re.compile(r"-[\d.]+(e[+-]?\d+)?").fullmatch  # behind an option it is its value


def main(words: Sequence[str]) -> int:
    """Searches; 1 where something found could not be copied."""
    own, terms = split_terms(words)
    taken = next(
        (
            word
            for before, word in pairwise(["", *own])
            if word[:1] == "-" and word[1:2].isalnum() and word != "-h" and not (before[:2] == "--" and _NUMBER(word))
        ),
        None,
    )
    if taken is not None:
        raise InputError(f"{taken}: what is taken away comes behind --, as in: cloob search IDX beach -- {taken}")
    arguments = parse(SearchArguments, own, "cloob search")
    _check(arguments, terms)
    check_index(arguments.index)
    from cloob.commands.work.search import run  # numpy and SQLite: only for words that are right

    return run(arguments, [*arguments.query, *terms])


def split_terms(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first ``--``, with ``-0`` spelled out, and the terms behind it."""
    place = list(words).index("--") if "--" in words else len(words)
    return ["--null" if word == "-0" else word for word in words[:place]], list(words[place + 1 :])


def check_index(address: str) -> None:
    """Raises InputError where there is no index, in no time."""
    path, scheme = Path(address), address.partition("://")[0]
    if scheme not in (address, "postgresql", "postgres"):
        raise InputError(f"{address}: {scheme}:// is no index; a folder or postgresql://… is wanted")
    if scheme == address and not (path / INDEX_FILE).is_file():
        there = "holds no index" if path.is_dir() else "is a file" if path.exists() else "no such folder"
        free = not any(path.iterdir()) if path.is_dir() else not path.exists()
        raise InputError(
            f"{address}: {there}; cloob index SRC --model M --out {address if free else 'NAME.idx'} makes one"
        )


def _check(arguments: SearchArguments, terms: Sequence[str]) -> None:
    """What goes with what."""
    asked = bool(arguments.query or terms or arguments.like)
    if arguments.duplicates and asked:
        raise InputError(
            "--duplicates compares all pictures with each other; leave the query out, --where takes a part"
        )
    if arguments.duplicates and (arguments.explain or arguments.sheet or arguments.open):
        raise InputError("--duplicates goes with --json, --paths and --copy-to alone")
    if arguments.duplicates and (arguments.top, arguments.cutoff) != (SearchArguments.top, SearchArguments.cutoff):
        raise InputError("--duplicates names all groups: --top and --cutoff are those of a query")
    if arguments.threshold != SearchArguments.threshold and not arguments.duplicates:
        raise InputError("--threshold is that of --duplicates; give both")
    if arguments.exact and not arguments.duplicates:
        raise InputError("--exact is that of --duplicates; give both")
    if arguments.exact and arguments.threshold != SearchArguments.threshold:
        raise InputError("--exact compares bytes and --threshold cosines; one of them")
    if not arguments.duplicates and not asked:
        raise InputError('nothing to search for: give words ("a red bird"), a picture or --like ID')
    if arguments.null and not arguments.paths:
        raise InputError("-0 ends the paths of --paths; give both")
    if arguments.paths and arguments.json:
        raise InputError("--paths and --json: one of them")
    if arguments.explain and (arguments.paths or arguments.copy_to or arguments.sheet or arguments.open):
        raise InputError("--explain goes with --json alone")
    if arguments.explain and arguments.cutoff != SearchArguments.cutoff:
        raise InputError("--explain leaves nothing out: --cutoff is that of a search")
    if arguments.beta is not None and not arguments.explain:
        raise InputError("--beta is that of --explain; give both")
    if not 1 <= arguments.top <= 100_000:
        raise InputError(f"--top is {arguments.top}; 1 to 100,000 is wanted")
    if not 0 < arguments.threshold <= 1:
        raise InputError(f"--threshold is {arguments.threshold}; a cosine above 0, at most 1, is wanted")
    if arguments.sheet is not None:
        check_out("--sheet", arguments.sheet, HTML)
    read_cutoff(arguments.cutoff)
