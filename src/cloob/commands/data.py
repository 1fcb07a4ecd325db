"""``cloob data``: look at a data set: what is in it, what is bad, what is there twice;
count shards.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

import cloob
from cloob.commands.console import (
    ColumnOptions,
    as_words,
    check,
    check_out,
    progress,
    say_next,
)
from cloob.commands.suspects import judge_pictures, judge_vectors, report
from cloob.data.shards.spec import is_remote
from cloob.errors import refuse

if TYPE_CHECKING:
    from cloob.data.source import Source

# Pairs up to which heads on frozen encoders are what to begin with
# (the page “Which objective”: 43,276).
_FEW = 50_000


@dataclass(frozen=True)
class Options:
    """Say what is in a data set, what is bad in it, and what is there twice; or count
    the samples of its shards.
    """

    data: Annotated[Positional[str], arg(metavar="DATA")] = ""
    """As of `cloob train`; with --count shards."""
    most: int = 10_000
    """Pairs to look at, spread evenly (over four files of a streamed set); 0 looks at
    all.
    """
    out: Path | None = None
    """A contact sheet (HTML); with --count the counts, for a local folder else
    sizes.json.
    """
    pictures: int = 60
    """Pictures on the contact sheet."""
    json: bool = False
    """Print one JSON object instead of the table."""
    suspects: Annotated[tuple[Path, ...] | None, arg(metavar="[FILE.csv]")] = None
    """After DATA: print the pairs that least seem to belong; FILE.csv lists all, --out
    FILE.html shows them.
    """
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
    count: bool = False
    """Only count the samples per shard, which streamed shards need before they can be
    read.
    """
    workers: int = 2
    """Decoding threads."""
    table: ColumnOptions = field(default_factory=ColumnOptions)


def run(options: Options) -> int:
    check(options, most=(0, 10**9), pictures=(1, 10_000), workers=(1, 1024))
    if options.out is not None:
        check_out(
            "--out", options.out, (".json",) if options.count else (".html", ".htm")
        )
    a, b, path = options.a, options.b, next(iter(options.suspects or ()), None)
    vectors = a is not None and b is not None
    refuse(
        {
            "--a and --b are needed together": (a is None) != (b is None),
            "DATA is missing; name a table, a folder or shards": not options.data
            and not vectors,
            "--a and --b go with --suspects and without DATA": vectors
            and (options.data or options.suspects is None),
            "--suspects takes one FILE.csv, and stands after DATA": len(
                options.suspects or ()
            )
            > 1,
            "--suspects prints no --json; --suspects FILE.csv writes a table": options.suspects
            is not None
            and options.json,
            "--out shows pictures; vectors have none": vectors
            and options.out is not None,
            "--model goes with --suspects": options.model is not None
            and options.suspects is None,
        }
    )
    if options.count:
        from cloob.data.shards.remote import write_counts

        counts, sizes = write_counts(options.data, options.out)
        line = f"{counts or options.data}: {len(sizes):,} shards, {sum(sizes.values()):,} samples"
        print(json.dumps(sizes) if options.json else line)
        if counts is None:  # the cache has the counts
            say_next(
                [
                    "train",
                    "--data",
                    options.data,
                ]
            )
        return 0
    if path is not None:
        check_out(
            "--suspects",
            path,
            (".csv",),
            [options.data, *(str(name) for name in (a, b, options.ids) if name)],
        )
        path.parent.mkdir(parents=True, exist_ok=True)
    if vectors:
        from cloob.data.vectors import open_pairs

        pairs = open_pairs(str(options.a), str(options.b), options.ids)
        report(judge_vectors(pairs, options.model), path)
        say_next(
            ["train", "vectors", "--clean", "auto", *as_words(options, "a", "b", "ids")]
        )
        return 0
    from cloob.data.open import open_source

    source = open_source(options.data, **options.table.columns)
    if options.suspects is None:
        return _survey(options, source)
    logging.getLogger("cloob.heads.features").setLevel(
        logging.INFO
    )  # how far the frozen encoders are
    config = cloob.get_recipe("align").override(workers=options.workers)
    judged = judge_pictures(source, config, options.model)
    report(judged, path, options.out, options.pictures)
    say_next([*_training(options, few=True), "--clean", "auto"])
    return 0


def _survey(options: Options, source: Source) -> int:
    from cloob.data.survey import survey, write_sheet
    from cloob.models.tokenizer import ClipTokenizer
    from cloob.models.towers import open_clip

    tokenizer = ClipTokenizer.of(open_clip().get_tokenizer("RN50"))
    with progress() as update:
        facts, usable = survey(
            source,
            lambda caption: len(tokenizer.encode(caption)) + 2,
            tokenizer.context_length,
            most=options.most,
            workers=options.workers,
            progress=partial(update, "pairs"),
        )
    spread = (
        ", spread over the set (--most 0 looks at all)"
        if facts["looked_at"] < facts["rows"]
        else ""
    )
    files = f" in {facts['shards']:,} files" if facts["shards"] > 1 else ""
    lines = [
        ("rows", f"{facts['rows']:,}{files}"),
        ("looked at", f"{facts['looked_at']:,}{spread}"),
    ]
    lines.append(("usable", f"{facts['usable']:,}"))
    for reason, fault in sorted(
        facts["bad"].items(), key=lambda item: -item[1]["count"]
    ):
        examples = fault["examples"]
        why = f" ({examples[0]['detail']})" if examples[0]["detail"] else ""
        lines.append(
            (
                reason,
                f"{fault['count']:,}, such as {', '.join(item['key'] for item in examples)}{why}",
            )
        )
    if (truncated := facts["truncated"])["count"]:
        lines.append(
            (
                "truncated JPEG",
                f"{truncated['count']:,}, taken, such as {', '.join(truncated['examples'])}",
            )
        )
    if facts["usable"]:
        pictures, captions, twice = (
            facts["pictures"],
            facts["captions"],
            facts["duplicates"],
        )
        frequent = "".join(
            f"; {most['count']:,} are {most['text'][:60]!r}"
            for most in twice["captions"]["most"][:1]
        )
        ranges = []
        for numbers in (
            pictures["width"],
            pictures["height"],
            captions["characters"],
            captions["tokens"],
        ):
            low, high, half, most = (
                f"{numbers[key]:,}" for key in ("min", "max", "median", "p95")
            )
            ranges.append(
                low
                if low == high
                else f"{low} to {high}, half of them at most {half}, 95 % at most {most}"
            )
        width, height, characters, tokens = ranges
        lines += [
            ("width", f"{width} pixels"),
            ("height", f"{height} pixels"),
            ("file", f"{pictures['bytes'] / facts['usable'] / 1e3:,.1f} kB a picture"),
            (
                "small pictures",
                f"{pictures['below_224']:,} with a side below 224 pixels",
            ),
            ("characters", f"{characters} a caption"),
            (
                "tokens",
                f"{tokens} a caption (CLIP's tokeniser, start and end included)",
            ),
            (
                "cut captions",
                f"{captions['cut']:,} with more than {captions['context_length']} tokens",
            ),
            (
                "equal pictures",
                f"{twice['pictures']['surplus']:,} copies among captioned pictures, byte by byte",
            ),
            (
                "equal captions",
                f"{twice['captions']['surplus']:,} repeats of another one{frequent}",
            ),
        ]
    if options.out is not None:
        write_sheet(options.out, source, facts, usable, lines, options.pictures)
    if options.json:
        print(json.dumps(facts))
        return 0
    longest = max(len(name) for name, _ in lines)
    print(
        facts["name"],
        *(f"  {name:<{longest}}  {sentence}" for name, sentence in lines),
        sep="\n",
    )
    if options.out is not None:
        print(options.out)
    if facts["rows"] * len(usable) >= 4 * facts["looked_at"]:
        say_next(_training(options, few=facts["rows"] <= _FEW))
    return 0


def _training(options: Options, *, few: bool) -> list[str]:
    more = as_words(options, "image_column", "caption_column")
    if is_remote(options.data):  # nothing of them can be held out
        more += ["--patience", "0"] if few else []
    elif not few:  # of few the recipe holds a tenth out by itself
        more += ["--val-split", "0.1"]
    return ["train", *(["align"] if few else []), "--data", options.data, *more]
