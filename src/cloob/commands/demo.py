"""``cloob demo``: train CLIP, InfoLOOB, CLOOB and a closed form on bundled pictures,
and search others.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cloob.commands.console import no_hints, say_next
from cloob.commands.eval import PAGE_FILE, RESULTS_FILE
from cloob.commands.options import Device, Range, as_words, run_command
from cloob.errors import InputError
from cloob.models.runs import run_files

OBJECTIVES = ("clip", "infoloob", "cloob", "cca")
FINDER = "infoloob"  # whose index is searched
TEXTS = ("red heart", "animal with a trunk", "yellow flower")
PAIRS, HELD_OUT, EMOJI = "demo", "demo:val", "demo:noto-emoji"
INDEX, PICTURES = "index", "pictures"
SUSPECTS = ("suspects.csv", "suspects.html")
WRITTEN = {*OBJECTIVES, INDEX, PICTURES, *SUSPECTS, RESULTS_FILE, PAGE_FILE}


@dataclass(frozen=True)
class Options:
    """Train CLIP, InfoLOOB, CLOOB and a closed form on bundled pictures, then
    search others; no network. Every command that does it is printed.
    """

    epochs: Annotated[int | None, Range(1, 10**6)] = None
    """Passes over the 6,110 pairs; the recipe's when left out."""
    out: Path = Path("runs/demo")
    """Folder of all this; an earlier demo in it is replaced."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(options: Options) -> int:
    """Runs the commands of a first look; the exit code."""
    out, device = options.out, as_words(options, "device")
    check_place(out)
    runs = [out / objective for objective in OBJECTIVES]
    table, page = (out / name for name in SUSPECTS)
    with no_hints():
        for place in runs:
            # a closed form has no loop
            length = [] if place.name == "cca" else as_words(options, "epochs")
            objective = ["--objective", place.name, *length, *device]
            do("train", "demo", *objective, "--overwrite", "--out", place)
        do("data", PAIRS, "--suspects", table, "--out", page)
        write_pictures(out / PICTURES)
        model = ["--model", str(out / FINDER), *device]
        do("index", out / PICTURES, *model, "--anew", "--out", out / INDEX)
        for text in TEXTS:
            do("search", out / INDEX, text, "--top", "4", *device)
        sets = ["--zeroshot", EMOJI, "--retrieval", HELD_OUT, *device]
        code = do("eval", *runs, *sets, "--out", out)
    print(
        "\nNo picture that is searched or classified here was trained on. One short run"
        " shows\nhow things work; it does not settle which objective is better."
    )
    say_next(
        ["serve", out / INDEX],
        ["search", out / INDEX, "an insect"],
        ["data", PAIRS, "--suspects", table, "--out", page],
    )
    return code


def do(command: str, *words: str | Path) -> int:
    """Prints a command, and runs it; the exit code."""
    typed = [command, *map(str, words)]
    print(f"\n$ {shlex.join(['cloob', *typed])}", flush=True)
    return run_command(command, typed[1:])


def check_place(out: Path) -> None:
    """Raises InputError for a folder that holds something else than an earlier demo."""
    first = OBJECTIVES[0]
    written = WRITTEN if run_files(out / first) else {first}
    others = sorted({path.name for path in out.glob("[!.]*")} - written)
    if others:
        raise InputError(
            f"{out}: holds {others[0]}, which no earlier demo wrote; give another --out"
        )


def write_pictures(folder: Path) -> None:
    """Writes the emoji as files that bear their names."""
    from cloob.evaluation.sets.pictures import open_labelled

    emoji = open_labelled(EMOJI)
    folder.mkdir(exist_ok=True)
    for place, label in enumerate(emoji.labels.tolist()):
        name = re.sub(r"[^\w (),.'-]", "_", emoji.classnames[label])
        (folder / f"{name} {place}.webp").write_bytes(emoji.read(place)[1])
