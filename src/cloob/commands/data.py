"""``cloob data``: what is in a data set, what is bad in it, what is there twice."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cloob
from cloob.commands.console import check_out, progress, say_next
from cloob.commands.options import Range, as_words
from cloob.commands.suspects import judge_pictures, judge_vectors, report
from cloob.data.shards.spec import is_pattern, is_remote, matching_files
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.data.source import Source

# Pairs up to which heads on frozen encoders are what to begin with
# (the page “Which objective”: 43,276).
_FEW = 50_000
_FEWEST = 4  # usable pairs: two to train on, two to hold out


@dataclass(frozen=True)
class Options:
    """Say what is in a data set, what is bad in it, and what is there twice; or which
    pairs do not belong together.
    """

    data: Annotated[str, "DATA"] = ""
    """As of `cloob train`."""
    most: Annotated[int, Range(0, 10**9)] = 10_000
    """Pairs to look at, spread evenly (over the first four files of a streamed set); 0
    looks at all.
    """
    json: bool = False
    """Print one JSON object instead of the table."""
    suspects: Annotated[tuple[Path, ...] | None, "[FILE.csv]"] = None
    """After DATA: print the pairs that least seem to belong; FILE.csv lists all."""
    out: Path | None = None
    """With --suspects: a page (HTML) of pictures that are probably wrong."""
    a: str | None = None
    """With --suspects, in place of DATA: a file of vectors, as of `cloob train
    vectors`.
    """
    b: str | None = None
    """The vectors that row by row belong to those of --a."""
    model: str | None = None
    """With --suspects: judge by this model (a run, a folder or a name, as of `cloob
    eval`) in place of a closed form.
    """
    ids: str | None = None
    """An id per pair of vectors."""
    workers: Annotated[int, Range(1, 1024)] = 2
    """Decoding threads."""
    image_column: str = "filepath"
    """Column of a table with the path of the picture."""
    caption_column: str = "title"
    """Column of a table with the caption."""


def run(options: Options) -> int:
    """Looks at a set, or lists its suspects."""
    check_sides(options)
    check_suspects(options)
    if options.suspects is None:
        look(options)
    else:
        find_suspects(options)
    return 0


def check_sides(options: Options) -> None:
    """Refuses options that do not go together."""
    has_vectors = options.a is not None and options.b is not None
    if (options.a is None) != (options.b is None):
        raise InputError("--a and --b are needed together")
    if not (options.data or has_vectors):
        raise InputError("DATA is missing; name a table, a folder or shards")
    if has_vectors and (options.data or options.suspects is None):
        raise InputError("--a and --b go with --suspects and without DATA")
    if has_vectors and options.out is not None:
        raise InputError("--out shows pictures; vectors have none")


def check_suspects(options: Options) -> None:
    """Refuses options that do not go with ``--suspects``, or need it, and files that
    cannot be written.
    """
    if options.suspects is None:
        if options.model is not None or options.out is not None:
            option = "--out" if options.model is None else "--model"
            raise InputError(f"{option} goes with --suspects")
        return
    if len(options.suspects) > 1:
        raise InputError("--suspects takes one FILE.csv, and stands after DATA")
    if options.json:
        raise InputError(
            "--suspects prints no --json; --suspects FILE.csv writes a table"
        )
    if options.out is not None:
        check_out("--out", options.out, (".html", ".htm"))
    for file in options.suspects:
        inputs = [*files_of(options.data), options.a, options.b, options.ids]
        check_out("--suspects", file, (".csv",), inputs)


def files_of(data: str) -> list[str]:
    """The files that DATA names on this machine, if it names any."""
    path = Path(data).expanduser()
    if is_pattern(data) and not is_remote(data) and not path.exists():
        return list(map(str, matching_files(str(path))))
    return [str(path)] if data else []


def find_suspects(options: Options) -> None:
    """Prints, lists and shows the pairs that least seem to belong."""
    if options.a is not None and options.b is not None:
        from cloob.data.vectors import open_vector_pairs

        pairs = open_vector_pairs(options.a, options.b, options.ids)
        judged = judge_vectors(pairs, options.model)
        train = ["train", "vectors", *as_words(options, "a", "b", "ids")]
    else:
        # how far the frozen encoders are
        logging.getLogger("cloob.heads.features").setLevel(logging.INFO)
        # the demo's pictures are small, and so are its encoders' inputs
        is_demo = options.data.partition(":")[0] == "demo"
        recipe = cloob.get_recipe("demo" if is_demo else "align")
        config = recipe.override(workers=options.workers)
        judged = judge_pictures(opened(options), config, options.model)
        train = training(options, on_frozen=True)
    file = options.suspects[0] if options.suspects else None
    report(judged, file, options.out)
    say_next([*train, "--clean", "auto"])


def opened(options: Options) -> Source:
    from cloob.data.open import open_source

    image, caption = options.image_column, options.caption_column
    return open_source(options.data, image_column=image, caption_column=caption)


def look(options: Options) -> None:
    """Prints what is in a set."""
    source = opened(options)  # refuses before torch is imported
    from cloob.data.survey import survey, table
    from cloob.models.importing import open_clip
    from cloob.models.tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer.of(open_clip().get_tokenizer("RN50"))
    counts = survey(
        source,
        lambda caption: len(tokenizer.encode(caption)) + 2,
        tokenizer.context_length,
        most=options.most,
        workers=options.workers,
        progress=partial(progress(), "pairs"),
    )
    if options.json:
        print(json.dumps(counts))
        return
    rows = table(counts)
    longest = max(len(name) for name, _ in rows)
    print(counts["name"])
    for name, sentence in rows:
        print(f"  {name:<{longest}}  {sentence}")
    usable_rows = counts["rows"] * counts["usable"] / max(1, counts["looked_at"])
    if usable_rows >= _FEWEST:
        say_next(training(options, on_frozen=counts["rows"] <= _FEW))


def training(options: Options, *, on_frozen: bool) -> list[str]:
    """The command that trains heads on frozen encoders, or towers, on the set."""
    words = ["train", "align"] if on_frozen else ["train"]
    words += ["--data", options.data]
    words += as_words(options, "image_column", "caption_column")
    if is_remote(options.data):  # nothing of it can be held out
        if on_frozen:
            words += ["--patience", "0"]
    elif not on_frozen:  # of which the recipe holds a tenth out by itself
        words += ["--val-split", "0.1"]
    return words
