"""``cloob data``: looks at a set of pairs, or counts its shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cloob.commands.arguments import CacheArguments, parse
from cloob.errors import InputError, require

if TYPE_CHECKING:
    import tyro

    from cloob.data.source import Source
    from cloob.data.survey import Survey
else:  # the annotations below are read when the words are parsed
    tyro = require("tyro", "train")


@dataclass(frozen=True)
class DataArguments:
    """Say what is in a data set, what is bad in it, and what is there twice; or count the samples of its shards."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Whatever `cloob train --data` reads; with --count a folder or pattern of shards."""
    most: int = 10_000
    """Pairs to look at, spread evenly (over four files of a streamed set); 0 looks at all."""
    out: Path | None = None
    """Write a contact sheet, one HTML file; with --count the list of counts, by default a local folder's sizes.json."""
    pictures: int = 60
    """Pictures on the contact sheet."""
    json: bool = False
    """Print one JSON object instead of the table."""
    count: bool = False
    """Count the samples in each shard, and nothing else; what streamed shards need before they can be read."""
    image_column: str = "filepath"
    """Column of a table with the path of the picture."""
    caption_column: str = "title"
    """Column of a table with the caption."""
    workers: int = 2
    """Decoding threads."""
    cache: CacheArguments = field(default_factory=CacheArguments)


def main(words: Sequence[str]) -> int:
    """Looks or counts, and prints what was found."""
    arguments = parse(DataArguments, words, "cloob data")
    for name, least in (("most", 0), ("pictures", 1), ("workers", 1)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name} is {getattr(arguments, name)}; {least} or more is wanted")
    arguments.cache.use()
    return _count(arguments) if arguments.count else _look(arguments)


def _count(arguments: DataArguments) -> int:
    from cloob.data.shards.count import write_counts

    path, sizes = write_counts(arguments.data, arguments.out)
    if arguments.json:
        print(json.dumps(sizes))
    else:
        where = path or f"--data {arguments.data!r} can be used"
        print(f"{where}: {len(sizes):,} shards, {sum(sizes.values()):,} samples")
    return 0


def _look(arguments: DataArguments) -> int:
    from cloob.data.open import open_source
    from cloob.data.survey import survey
    from cloob.models.tokenizer import FastTokenizer
    from cloob.models.towers import open_clip

    source = open_source(arguments.data, image_column=arguments.image_column, caption_column=arguments.caption_column)
    tokenizer = FastTokenizer(open_clip().get_tokenizer("RN50"))
    result = survey(
        source,
        lambda caption: len(tokenizer.encode(caption)) + 2,
        tokenizer.context_length,
        most=arguments.most,
        workers=arguments.workers,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    if arguments.out is not None:
        _write_sheet(arguments, source, result)
    if arguments.json:
        print(json.dumps(result.as_dict()))
    else:
        _print(result)
        if arguments.out is not None:
            print(arguments.out)
    return 0


def _write_sheet(arguments: DataArguments, source: Source, result: Survey) -> None:
    from cloob.evaluate.report.sheet import write_sheet

    assert arguments.out is not None
    write_sheet(arguments.out, source, result, lines(result), arguments.pictures)


def lines(result: Survey) -> list[tuple[str, str]]:
    """What was seen, a name and a sentence a line."""
    from cloob.data.survey import SMALL_SIDE

    facts = result.as_dict()
    spread = ", spread over the set (--most 0 looks at all)" if result.seen < result.rows else ""
    files = f" in {result.shards:,} files" if result.shards > 1 else ""
    shown = [
        ("rows", f"{result.rows:,}{files}"),
        ("looked at", f"{result.seen:,}{spread}"),
        ("usable", f"{len(result.usable):,}"),
    ]
    for reason, (count, examples) in sorted(result.bad.items(), key=lambda item: -item[1][0]):
        shown.append((reason, f"{count:,}, such as {', '.join(skip.key for skip in examples)}"))
    pictures, captions, twice = facts["pictures"], facts["captions"], facts["duplicates"]
    if result.usable:
        shown += [
            ("width", f"{_range(pictures['width'])} pixels"),
            ("height", f"{_range(pictures['height'])} pixels"),
            ("file", f"{pictures['bytes'] / len(result.usable) / 1e3:,.1f} kB a picture"),
            ("small pictures", f"{result.small:,} with a side below {SMALL_SIDE} pixels"),
            ("characters", f"{_range(captions['characters'])} a caption"),
            ("tokens", f"{_range(captions['tokens'])} a caption (CLIP's tokeniser, start and end included)"),
            ("cut captions", f"{result.cut:,} with more than {result.context_length} tokens"),
            ("equal pictures", f"{twice['pictures']['surplus']:,} copies of another one, byte by byte"),
            ("equal captions", f"{twice['captions']['surplus']:,} repeats of another one{_most(twice['captions'])}"),
        ]
    return shown


def _range(numbers: dict[str, int]) -> str:
    if numbers["min"] == numbers["max"]:
        return f"{numbers['min']:,}"
    return (
        f"{numbers['min']:,} to {numbers['max']:,}, half of them at most {numbers['median']:,}, "
        f"95 % at most {numbers['p95']:,}"
    )


def _most(repeats: dict[str, Any]) -> str:
    """The most frequent caption."""
    if not repeats["most"]:
        return ""
    first = repeats["most"][0]
    text = first["text"] if len(first["text"]) <= 60 else f"{first['text'][:59]}…"
    return f"; {first['count']:,} say {text!r}"


def _print(result: Survey) -> None:
    rows = lines(result)
    width = max(len(name) for name, _ in rows)
    print(result.name)
    print("\n".join(f"  {name:<{width}}  {sentence}" for name, sentence in rows))


def _show_progress(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} pairs", end="\n" if done == total else "", file=sys.stderr, flush=True)
