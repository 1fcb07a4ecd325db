"""Looks at a set of pairs or counts its shards as ``cloob data`` was asked to, and says what there is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cloob.commands.measuring import DataArguments
from cloob.commands.steps import columns, say_next, shell
from cloob.data.open import open_source
from cloob.data.shards.count import write_counts
from cloob.data.shards.spec import is_remote
from cloob.data.split import most_held_out
from cloob.data.survey import SMALL_SIDE, Survey, survey
from cloob.evaluation.report.sheet import write_sheet
from cloob.models.tokenizer import ClipTokenizer
from cloob.models.towers import open_clip
from cloob.training.config.parts import VAL_SPLIT

_FEW = 50_000  # pairs up to which heads on frozen encoders are what to begin with (docs/choose.md: 43,276 were studied)


def run(arguments: DataArguments) -> int:
    """Looks or counts; returns the exit code."""
    return _count(arguments) if arguments.count else _look(arguments)


def _count(arguments: DataArguments) -> int:
    path, sizes = write_counts(arguments.data, arguments.out)
    if arguments.json:
        print(json.dumps(sizes))
    else:
        where = path or f"{shell(['train', '--data', arguments.data, *_cache(arguments)])} can be used"
        print(f"{where}: {len(sizes):,} shards, {sum(sizes.values()):,} samples")
    return 0


def _look(arguments: DataArguments) -> int:
    source = open_source(arguments.data, image_column=arguments.image_column, caption_column=arguments.caption_column)
    tokenizer = ClipTokenizer.of(open_clip().get_tokenizer("RN50"))
    result = survey(
        source,
        lambda caption: len(tokenizer.encode(caption)) + 2,
        tokenizer.context_length,
        most=arguments.most,
        workers=arguments.workers,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    if arguments.out is not None:
        write_sheet(arguments.out, source, result, lines(result), arguments.pictures)
    if arguments.json:
        print(json.dumps(result.as_dict()))
    else:
        _print(result)
        if arguments.out is not None:
            print(arguments.out)
        if training := _training(arguments, result):
            say_next(training)
    return 0


def _training(arguments: DataArguments, result: Survey) -> list[str | Path]:
    """How to train on what was looked at: heads on frozen encoders unless large; nothing where it is too small."""
    few, elsewhere = result.rows <= _FEW, is_remote(arguments.data)
    usable = result.rows * len(result.usable) // max(1, result.seen)
    left = usable if elsewhere else usable - most_held_out(usable, VAL_SPLIT)
    if left < 2:
        return []
    held_out: list[str] = []
    if few and elsewhere:
        held_out = ["--patience", "0"]  # which counts looks at held-out pairs
    elif not few and not elsewhere:  # of few the recipe holds a tenth out by itself
        held_out = ["--val-split", f"{VAL_SPLIT:g}"]
    named = columns(arguments.image_column, arguments.caption_column)
    pairs = ["--data", arguments.data, *named, *_cache(arguments)]
    return ["train", *(["align"] if few else []), *pairs, *held_out]


def _cache(arguments: DataArguments) -> list[str | Path]:
    """The option of the folder that counts were remembered in, where one was named."""
    folder = arguments.cache.cache_dir
    return [] if folder is None else ["--cache-dir", folder]


def lines(result: Survey) -> list[tuple[str, str]]:
    """What was seen, a name and a sentence a line."""
    facts = result.as_dict()
    spread = ", spread over the set (--most 0 looks at all)" if result.seen < result.rows else ""
    files = f" in {result.shards:,} files" if result.shards > 1 else ""
    shown = [
        ("rows", f"{result.rows:,}{files}"),
        ("looked at", f"{result.seen:,}{spread}"),
        ("usable", f"{len(result.usable):,}"),
    ]
    for reason, (count, examples) in sorted(result.bad.items(), key=lambda item: -item[1][0]):
        why = f" ({examples[0].detail})" if examples[0].detail else ""
        shown.append((reason, f"{count:,}, such as {', '.join(skip.key for skip in examples)}{why}"))
    if result.truncated:
        shown.append(("truncated JPEG", f"{len(result.truncated):,}, taken, such as {', '.join(result.truncated[:3])}"))
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
            ("equal pictures", f"{twice['pictures']['surplus']:,} copies among captioned pictures, byte by byte"),
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
