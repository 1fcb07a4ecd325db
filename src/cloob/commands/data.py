"""``cloob data``: looks at a set of pairs, or counts its shards."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cloob
from cloob.commands.console import CacheOptions, ColumnOptions, as_words, check_out, progress, say_next, tyro, within
from cloob.errors import refuse

_FEW = 50_000  # pairs up to which heads on frozen encoders are what to begin with (docs/choose.md: 43,276 were studied)


@dataclass(frozen=True)
class Options:
    """Say what is in a data set, what is bad in it, and what is there twice; or count the samples of its shards."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")] = ""
    """Whatever `cloob train --data` reads; with --count a folder or pattern of shards."""
    most: int = 10_000  # Pairs to look at, spread evenly (over four files of a streamed set); 0 looks at all.
    out: Path | None = None  # A contact sheet (HTML); with --count the counts, for a local folder else sizes.json.
    pictures: int = 60  # Pictures on the contact sheet.
    json: bool = False  # Print one JSON object instead of the table.
    suspects: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="[FILE.csv]")] = None
    """After DATA: print the pairs that least seem to belong together, and list all of them in the file, if one is
    given, the most suspicious first; --out FILE.html shows them."""
    a: str | None = None  # With --suspects, in place of DATA: a file of vectors, as of `cloob train vectors`.
    b: str | None = None  # The vectors that row by row belong to those of --a.
    ids: str | None = None  # An id for each pair of vectors.
    count: bool = False  # Only count the samples in each shard, which streamed shards need before they can be read.
    workers: int = 2  # Decoding threads.
    table: ColumnOptions = field(default_factory=ColumnOptions)
    machine: CacheOptions = field(default_factory=CacheOptions)


def run(options: Options) -> int:
    within(options, most=(0, 10**9), pictures=(1, 10_000), workers=(1, 1024))
    if options.out is not None:
        check_out("--out", options.out, (".json",) if options.count else (".html", ".htm"))
    vectors = options.a is not None and options.b is not None
    refuse(
        {
            "DATA is missing; name a table, a folder or shards": not options.data and not vectors,
            "--a and --b go with --suspects and without DATA": vectors and (options.data or options.suspects is None),
            "--suspects takes one FILE.csv, and stands after DATA": len(options.suspects or ()) > 1,
            "--out shows pictures; vectors have none": vectors and options.out is not None,
        }
    )
    if options.count:
        from cloob.data.shards.remote import write_counts

        path, sizes = write_counts(options.data, options.out)
        line = f"{path or options.data}: {len(sizes):,} shards, {sum(sizes.values()):,} samples"
        print(json.dumps(sizes) if options.json else line)
        if path is None:  # the cache has the counts
            say_next(["train", "--data", options.data, *as_words(options, "cache_dir")])
        return 0
    if options.suspects is not None:
        return _list_suspects(options, *options.suspects)
    from cloob.data.open import open_source

    source = open_source(options.data, **options.table.columns)
    from cloob.data.survey import survey, write_sheet  # heavier, once there are data
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
    lines = _lines(facts)
    if options.out is not None:
        write_sheet(options.out, source, facts, usable, lines, options.pictures)
    if options.json:
        print(json.dumps(facts))
        return 0
    width = max(len(name) for name, _ in lines)
    print(facts["name"], *(f"  {name:<{width}}  {sentence}" for name, sentence in lines), sep="\n")
    if options.out is not None:
        print(options.out)
    if facts["rows"] * len(usable) >= 4 * facts["looked_at"]:
        say_next(_training(options, few=facts["rows"] <= _FEW))
    return 0


def _list_suspects(options: Options, path: Path | None = None) -> int:
    if path is not None:
        check_out("--suspects", path, (".csv",), [options.data])
    from cloob.commands import suspects

    if options.a is not None and options.b is not None:
        from cloob.data.vectors import open_pairs

        suspects.Suspects(open_pairs(options.a, options.b, options.ids)).write(path)
        say_next(["train", "vectors", "--clean", "auto", *as_words(options, "a", "b", "ids")])
        return 0
    from cloob.data.open import open_source

    source = open_source(options.data, **options.table.columns)
    logging.getLogger("cloob.training.align").setLevel(logging.INFO)  # how far the frozen encoders are
    config = cloob.get_recipe("align").override(workers=options.workers, cache_dir=options.machine.cache_dir)
    result = suspects.of_pictures(source, config)
    result.write(path)
    if options.out is not None:
        suspects.write_page(options.out, source, result, options.pictures)
        print(options.out)
    say_next([*_training(options, few=True), "--clean", "auto"])
    return 0


def _training(options: Options, *, few: bool) -> list[str]:
    from cloob.data.shards.spec import is_remote

    more = as_words(options, "image_column", "caption_column", "cache_dir")
    if is_remote(options.data):  # nothing of them can be held out
        more += ["--patience", "0"] if few else []
    elif not few:  # of few the recipe holds a tenth out by itself
        more += ["--val-split", "0.1"]
    return ["train", *(["align"] if few else []), "--data", options.data, *more]


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    spread = ", spread over the set (--most 0 looks at all)" if facts["looked_at"] < facts["rows"] else ""
    files = f" in {facts['shards']:,} files" if facts["shards"] > 1 else ""
    lines = [("rows", f"{facts['rows']:,}{files}"), ("looked at", f"{facts['looked_at']:,}{spread}")]
    lines.append(("usable", f"{facts['usable']:,}"))
    for reason, fault in sorted(facts["bad"].items(), key=lambda item: -item[1]["count"]):
        examples = fault["examples"]
        why = f" ({examples[0]['detail']})" if examples[0]["detail"] else ""
        lines.append((reason, f"{fault['count']:,}, such as {', '.join(each['key'] for each in examples)}{why}"))
    if (truncated := facts["truncated"])["count"]:
        lines.append(("truncated JPEG", f"{truncated['count']:,}, taken, such as {', '.join(truncated['examples'])}"))
    if not facts["usable"]:
        return lines
    pictures, captions, twice = facts["pictures"], facts["captions"], facts["duplicates"]
    frequent = "".join(f"; {most['count']:,} are {most['text'][:60]!r}" for most in twice["captions"]["most"][:1])
    return [
        *lines,
        ("width", f"{_range(pictures['width'])} pixels"),
        ("height", f"{_range(pictures['height'])} pixels"),
        ("file", f"{pictures['bytes'] / facts['usable'] / 1e3:,.1f} kB a picture"),
        ("small pictures", f"{pictures['below_224']:,} with a side below 224 pixels"),
        ("characters", f"{_range(captions['characters'])} a caption"),
        ("tokens", f"{_range(captions['tokens'])} a caption (CLIP's tokeniser, start and end included)"),
        ("cut captions", f"{captions['cut']:,} with more than {captions['context_length']} tokens"),
        ("equal pictures", f"{twice['pictures']['surplus']:,} copies among captioned pictures, byte by byte"),
        ("equal captions", f"{twice['captions']['surplus']:,} repeats of another one{frequent}"),
    ]


def _range(numbers: dict[str, int]) -> str:
    low, high, half, most = (f"{numbers[key]:,}" for key in ("min", "max", "median", "p95"))
    return low if low == high else f"{low} to {high}, half of them at most {half}, 95 % at most {most}"
