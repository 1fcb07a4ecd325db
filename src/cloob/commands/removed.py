"""What left the command line, and what serves instead. Nothing heavy is imported."""

from __future__ import annotations

from cloob.errors import InputError

COMMANDS = {
    "analyze": "cloob eval RUN --retrieval PAIRS --checkpoints",
    "convert": "cloob export SRC --to cloob --out DEST",
    "models": "cloob find --models, and for towers cloob train --list",
    "push": "cloob export RUN --to transformers --out DIR, then hf upload ORG/NAME DIR",
    "recipes": "cloob train --list",
}
"""Command that left: what to type instead."""

_PATHS = "--paths prints a list for czkawka, immich or digiKam"
_LABEL = "--paths LABEL prints a list of files for cp, mv or rsync"
_MATCH = "`cloob match` ranks vectors of one file for those of another"
_RECIPE = "scikit-learn on the vectors of `cloob embed` fits a head"
_ONE_MODEL = "an index has one model; --anew makes it again by another one"
_CUTOFF = "--cutoff none lists the nearest pictures"
OPTIONS = {
    "search --by": "--where \"caption like '%heron%'\" looks for words",
    "search --duplicates": _PATHS,
    "search --exact": _PATHS,
    "search --rest": _PATHS,
    "search --explain": _CUTOFF,
    "search --beta": _CUTOFF,
    "search --a": _MATCH,
    "search --b": _MATCH,
    "index --vectors": _MATCH,
    "index --labels": _MATCH,
    "index --a": _MATCH,
    "index --b": _MATCH,
    "index --merge": "one index takes several sources",
    "index --moved": "name the new folder as SRC: known pictures cost a hash",
    "index --store": "--out names the folder of the index",
    "index --exclude": "name the sub-folders, or leave paths out by --where",
    "index --max-megapixels": "what is too large is left out and listed by --faults",
    "index --name": _ONE_MODEL,
    "index --replace-model": _ONE_MODEL,
    "search --model": _ONE_MODEL,
    "search --null": "--paths prints a path a line, as xargs -d '\\n' reads it",
    "serve --model": _ONE_MODEL,
    "classify --csv": "--json prints an object a line",
    "classify --examples": _RECIPE,
    "classify --head": _RECIPE,
    "classify --inv-tau": "the model's own temperature is taken",
    "eval --suite": "--paper DIR reads the paper's sets, --zeroshot DIR … any others",
    "eval --shots": "a probe takes all training images, as the paper's do",
    "eval --probe-seeds": "a probe takes all training images",
    "eval --root": "--paper DIR reads the paper's sets",
    "export --results": "a card has no numbers; results.json and report.html do",
    "export --int8": "onnxruntime.quantization makes smaller graphs of an export",
    "classify --copy-to": _LABEL,
    "classify --move-to": _LABEL,
    "serve --token": "$CLOOB_TOKEN chooses it",
    "serve --token-file": "CLOOB_TOKEN=$(cat FILE) chooses it",
    "serve --update": "`cloob index --out IDX`, by cron, while it is served",
    "train --grad-checkpointing": "--micro-batch-size saves memory with any tower",
    "train --wandb": "a Callback in Python logs elsewhere: the page “Train”",
    "data --count": "a set is counted when it is opened, and sizes.json spares that",
    "data --pictures": "--suspects FILE.csv --out FILE.html shows pictures",
    "--cache-dir": "$CLOOB_CACHE names the folder",
    "--cache-gb": "$CLOOB_CACHE_BYTES is the size, in bytes",
}
"""Option that left, of one command or of all: what serves."""


def refuse_command(name: str) -> None:
    """Raises InputError for a command that left, with its successor."""
    if name in COMMANDS:
        raise InputError(f"cloob {name} is gone; use {COMMANDS[name]}")


def refuse_option(command: str, option: str) -> None:
    """Raises InputError for an option that left, with what serves instead."""
    command = "search" if command == "find" else command
    for key in (f"{command} {option}", option):
        if key in OPTIONS:
            raise InputError(f"{option} is gone; {OPTIONS[key]}")
