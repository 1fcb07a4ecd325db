"""What left the command line, and what serves instead. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence

from cloob.errors import InputError

COMMANDS = {
    "analyze": "cloob eval RUN --retrieval PAIRS --checkpoints",
    "convert": "cloob export SRC --to cloob --out DEST",
    "models": "cloob find --models, and for towers cloob train --list",
    "push": "cloob export RUN --to transformers --out DIR, then hf upload ORG/NAME DIR",
    "recipes": "cloob train --list",
}
"""Command that left: what to type instead."""

_EVERYWHERE = {
    "--cache-dir": "$CLOOB_CACHE names the folder",
    "--cache-gb": "$CLOOB_CACHE_BYTES is the size, in bytes",
}
_LISTS = "czkawka, digiKam or immich do this with the paths that --paths prints"
_FOLDERS = "--paths LABEL prints a list of files for cp, mv or rsync"
_PAIRS = "`cloob match` ranks vectors of one file for those of another"
_RECIPE = "scikit-learn on the vectors of `cloob embed` fits a head"
_OF_SEARCH = {
    "--by": "--where \"caption like '%heron%'\" looks for words",
    "--duplicates": _LISTS,
    "--exact": _LISTS,
    "--rest": _LISTS,
    "--threshold": _LISTS,
    "--explain": "--cutoff none lists the nearest pictures",
    "--beta": "--cutoff none lists the nearest pictures",
    "--copy-to": _LISTS,
    "--a": _PAIRS,
    "--b": _PAIRS,
}
_OPTIONS: dict[str, dict[str, str]] = {
    "search": _OF_SEARCH,
    "find": _OF_SEARCH,
    "index": {
        "--store": "--out names the folder of the index",
        "--vectors": _PAIRS,
        "--labels": _PAIRS,
        "--a": _PAIRS,
        "--b": _PAIRS,
        "--merge": "one index takes several sources",
        "--moved": "name the new folder as SRC: known pictures cost a hash",
    },
    "classify": {
        "--examples": _RECIPE,
        "--head": _RECIPE,
        "--inv-tau": "the model's own temperature is taken",
        "--copy-to": _FOLDERS,
        "--move-to": _FOLDERS,
    },
}
"""By command: the option that left, and the sentence that says what serves."""


def refuse_removed(command: str, words: Sequence[str]) -> None:
    """Raises InputError for a command or an option that left, with its successor."""
    if command in COMMANDS:
        raise InputError(f"cloob {command} is gone; use {COMMANDS[command]}")
    gone = _EVERYWHERE | _OPTIONS.get(command, {})
    for word in words:
        if word == "--":
            return
        option = word.partition("=")[0]
        if option in gone:
            raise InputError(f"{option} is gone; {gone[option]}")
