"""``cloob data``: looks at a set of pairs, or counts its shards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cloob.commands.options import HTML, CacheOptions, as_words, at_least, check_out, tyro
from cloob.commands.terminal import Progress, say_next, shell

if TYPE_CHECKING:
    from cloob.data.survey import Survey

_FEW = 50_000  # pairs up to which heads on frozen encoders are what to begin with (docs/choose.md: 43,276 were studied)


@dataclass(frozen=True)
class Options:
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
    cache: CacheOptions = field(default_factory=CacheOptions)


def check(options: Options) -> None:
    at_least(options, {"most": 0, "pictures": 1, "workers": 1})
    if options.out is not None:
        check_out("--out", options.out, (".json",) if options.count else HTML)


def run(options: Options) -> int:
    """Looks or counts, and prints the facts."""
    return _count(options) if options.count else _look(options)


def _count(options: Options) -> int:
    from cloob.data.shards.remote import write_counts

    path, sizes = write_counts(options.data, options.out)
    if options.json:
        print(json.dumps(sizes))
    else:
        where = path or f"{shell(['train', '--data', options.data, *as_words(options, 'cache_dir')])} can be used"
        print(f"{where}: {len(sizes):,} shards, {sum(sizes.values()):,} samples")
    return 0


def _look(options: Options) -> int:
    from cloob.data.open import open_source

    source = open_source(options.data, image_column=options.image_column, caption_column=options.caption_column)
    from cloob.data.survey import survey, write_sheet  # what is heavier, once there are data
    from cloob.models.tokenizer import ClipTokenizer
    from cloob.models.towers import open_clip

    tokenizer = ClipTokenizer.of(open_clip().get_tokenizer("RN50"))
    with Progress() as progress:
        result = survey(
            source,
            lambda caption: len(tokenizer.encode(caption)) + 2,
            tokenizer.context_length,
            most=options.most,
            workers=options.workers,
            progress=partial(progress.update, "pairs"),
        )
    lines = _lines(result)
    if options.out is not None:
        write_sheet(options.out, source, result, lines, options.pictures)
    if options.json:
        print(json.dumps(result.as_dict()))
        return 0
    width = max(len(name) for name, _ in lines)
    print(result.name, *(f"  {name:<{width}}  {sentence}" for name, sentence in lines), sep="\n")
    if options.out is not None:
        print(options.out)
    if training := _training(options, result):
        say_next(training)
    return 0


def _training(options: Options, result: Survey) -> list[str]:
    """How to train on these pairs: heads on frozen encoders if they are few; nothing if they are too few."""
    from cloob.data.shards.spec import is_remote
    from cloob.data.split import most_held_out
    from cloob.training.config.parts import VAL_SPLIT

    few, elsewhere = result.rows <= _FEW, is_remote(options.data)
    usable = result.rows * len(result.usable) // max(1, result.seen)
    left = usable if elsewhere else usable - most_held_out(usable, VAL_SPLIT)
    if left < 2:
        return []
    held_out: list[str] = []
    if few and elsewhere:
        held_out = ["--patience", "0"]  # which needs held-out pairs
    elif not few and not elsewhere:  # of few the recipe holds a tenth out by itself
        held_out = ["--val-split", f"{VAL_SPLIT:g}"]
    more = as_words(options, "image_column", "caption_column", "cache_dir")
    return ["train", *(["align"] if few else []), "--data", options.data, *more, *held_out]


def _lines(result: Survey) -> list[tuple[str, str]]:
    """The facts, a name and a sentence each."""
    from cloob.data.survey import SMALL_SIDE

    facts = result.as_dict()
    spread = ", spread over the set (--most 0 looks at all)" if result.seen < result.rows else ""
    files = f" in {result.shards:,} files" if result.shards > 1 else ""
    lines = [
        ("rows", f"{result.rows:,}{files}"),
        ("looked at", f"{result.seen:,}{spread}"),
        ("usable", f"{len(result.usable):,}"),
    ]
    for reason, (count, examples) in sorted(result.bad.items(), key=lambda item: -item[1][0]):
        why = f" ({examples[0].detail})" if examples[0].detail else ""
        lines.append((reason, f"{count:,}, such as {', '.join(skip.key for skip in examples)}{why}"))
    if result.truncated:
        lines.append(("truncated JPEG", f"{len(result.truncated):,}, taken, such as {', '.join(result.truncated[:3])}"))
    pictures, captions, twice = facts["pictures"], facts["captions"], facts["duplicates"]
    if result.usable:
        lines += [
            ("width", f"{_range(pictures['width'])} pixels"),
            ("height", f"{_range(pictures['height'])} pixels"),
            ("file", f"{pictures['bytes'] / len(result.usable) / 1e3:,.1f} kB a picture"),
            ("small pictures", f"{result.small:,} with a side below {SMALL_SIDE} pixels"),
            ("characters", f"{_range(captions['characters'])} a caption"),
            ("tokens", f"{_range(captions['tokens'])} a caption (CLIP's tokeniser, start and end included)"),
            ("cut captions", f"{result.cut:,} with more than {result.context_length} tokens"),
            ("equal pictures", f"{twice['pictures']['surplus']:,} copies among captioned pictures, byte by byte"),
            ("equal captions", f"{twice['captions']['surplus']:,} repeats of another one{_most(twice['captions'])}"),
        ]
    return lines


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
