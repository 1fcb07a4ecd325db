"""A survey of a set of pairs: sizes of pictures, lengths of captions, bad samples,
duplicates.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cloob.data.batch import BadSample, RawSample, Skip, caption_id, decoding
from cloob.data.open import spread_rows
from cloob.data.source import Source
from cloob.machine import in_threads
from cloob.pictures import Encoded

_N_EXAMPLES = 3
_N_REPEATED = 10
_AHEAD = 64  # pairs that are decoded early

Numbers = dict[str, Any]  # as ``cloob data --json`` prints them


@dataclass(frozen=True)
class Usable:
    """What is counted of a pair that can be used."""

    row: int
    key: str
    caption: str
    width: int  # pixels
    height: int
    size: int  # of the file, bytes
    content: bytes  # a digest of them
    truncated: bool  # a JPEG without its end


def survey(
    source: Source,
    count_tokens: Callable[[str], int],
    context_length: int,
    *,
    most: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> Numbers:
    """Reads and decodes ``most`` pairs, spread over the source, 0: all."""
    rows = spread_rows(source, most) if most else range(len(source))
    pairs: list[Usable] = []
    bad: dict[str, list[Numbers]] = {}
    examined = in_threads(partial(_examine, source), rows, workers, _AHEAD)
    for done, pair in enumerate(examined, 1):
        progress(done, len(rows))
        if isinstance(pair, Usable):
            pairs.append(pair)
        else:
            example = {"key": pair.key, "detail": pair.detail}
            bad.setdefault(pair.reason, []).append(example)
    most_frequent = sorted(bad, key=lambda reason: -len(bad[reason]))
    return {
        "name": source.name,
        "rows": len(source),
        "shards": len(source.shard_sizes),
        "looked_at": len(rows),
        "usable": len(pairs),
        "bad": {reason: _examples(bad[reason]) for reason in most_frequent},
        "truncated": _examples([pair.key for pair in pairs if pair.truncated]),
        "pictures": _pictures(pairs),
        "captions": _captions(pairs, count_tokens, context_length),
        "duplicates": {
            "pictures": _repeats(
                [(pair.content, pair.key, pair.row) for pair in pairs]
            ),
            "captions": _repeats(
                [(caption_id(pair.caption), pair.caption, pair.row) for pair in pairs]
            ),
        },
    }


def _examine(source: Source, row: int) -> Usable | Skip:
    """A pair, decoded; why it is bad, if it is."""
    try:
        sample: RawSample = source.read(row)
        with decoding(sample.key):
            encoded = Encoded(sample.image)
            width, height = encoded.size
            encoded.rgb()
    except BadSample as bad:
        return bad.skip
    return Usable(
        row,
        sample.key,
        sample.caption,
        width,
        height,
        size=len(sample.image),
        content=hashlib.blake2b(sample.image, digest_size=16).digest(),
        truncated=encoded.truncated,
    )


def _examples(found: Sequence[object]) -> Numbers:
    """How many there are, and some of them."""
    return {"count": len(found), "examples": found[:_N_EXAMPLES]}


def _pictures(pairs: Sequence[Usable]) -> Numbers:
    """Sizes of usable pictures; most towers enlarge those ``below_224``."""
    return {
        "width": _range([pair.width for pair in pairs]),
        "height": _range([pair.height for pair in pairs]),
        "bytes": sum(pair.size for pair in pairs),
        "below_224": sum(min(pair.width, pair.height) < 224 for pair in pairs),
    }


def _captions(
    pairs: Sequence[Usable], count_tokens: Callable[[str], int], context_length: int
) -> Numbers:
    """Lengths of usable captions, and how many a tower cuts."""
    tokens = [count_tokens(pair.caption) for pair in pairs]
    return {
        "characters": _range([len(pair.caption) for pair in pairs]),
        "tokens": _range(tokens),
        "context_length": context_length,
        "cut": sum(count > context_length for count in tokens),
    }


def _range(values: Sequence[int]) -> Numbers:
    """The smallest, the median, the 95th percentile and the largest of numbers."""
    places = np.percentile(values or [0], (0, 50, 95, 100), method="inverted_cdf")
    return dict(zip(("min", "median", "p95", "max"), places.tolist(), strict=True))


def _repeats(things: Sequence[tuple[Hashable, str, int]]) -> Numbers:
    """How many things could be left out without losing any, and the most frequent. A
    thing is what makes two of them equal, its text, and its row.
    """
    counts = Counter(key for key, _, _ in things)
    first_of_key: dict[Hashable, Numbers] = {}
    for key, text, row in things:
        first = {"count": counts[key], "text": text, "row": row}
        first_of_key.setdefault(key, first)
    repeated = [key for key, n in counts.most_common(_N_REPEATED) if n > 1]
    return {
        "surplus": len(things) - len(counts),
        "most": [first_of_key[key] for key in repeated],
    }


def table(seen: Numbers) -> list[tuple[str, str]]:
    """The lines of ``cloob data``: what was counted, and the count."""
    files = f" in {seen['shards']:,} files" if seen["shards"] > 1 else ""
    spread = ", spread over the set (--most 0 looks at all)"
    is_part = seen["looked_at"] < seen["rows"]
    lines = [
        ("rows", f"{seen['rows']:,}{files}"),
        ("looked at", f"{seen['looked_at']:,}{spread if is_part else ''}"),
        ("usable", f"{seen['usable']:,}"),
    ]
    for reason, bad in seen["bad"].items():
        examples = ", ".join(map(_bad_in_words, bad["examples"]))
        lines.append((reason, f"{bad['count']:,}, such as {examples}"))
    truncated = seen["truncated"]
    if truncated["count"]:
        examples = ", ".join(truncated["examples"])
        words = f"{truncated['count']:,}, taken, such as {examples}"
        lines.append(("truncated JPEG", words))
    return lines + _lines_of_usable(seen) if seen["usable"] else lines


def _bad_in_words(pair: Numbers) -> str:
    return f"{pair['key']} ({pair['detail']})" if pair["detail"] else str(pair["key"])


def _lines_of_usable(seen: Numbers) -> list[tuple[str, str]]:
    """Sizes, captions, copies."""
    pictures, captions = seen["pictures"], seen["captions"]
    equal_pictures = seen["duplicates"]["pictures"]
    equal_captions = seen["duplicates"]["captions"]
    example = ""
    if equal_captions["most"]:
        example = f", most of {equal_captions['most'][0]['text'][:60]!r}"
    return [
        ("width", f"{_in_words(pictures['width'])} pixels"),
        ("height", f"{_in_words(pictures['height'])} pixels"),
        ("file", f"{pictures['bytes'] / seen['usable'] / 1e3:,.1f} kB a picture"),
        ("small pictures", f"{pictures['below_224']:,} with a side below 224 pixels"),
        ("characters", f"{_in_words(captions['characters'])} a caption"),
        ("tokens", f"{_in_words(captions['tokens'])} a caption (CLIP's tokeniser)"),
        (
            "cut captions",
            f"{captions['cut']:,} with more than {captions['context_length']} tokens",
        ),
        ("equal pictures", f"{equal_pictures['surplus']:,} copies, byte by byte"),
        (
            "equal captions",
            f"{equal_captions['surplus']:,} repeats of another one{example}",
        ),
    ]


def _in_words(values: Numbers) -> str:
    if values["min"] == values["max"]:
        return f"{values['min']:,}"
    most = f"half of them at most {values['median']:,}, 95 % at most {values['p95']:,}"
    return f"{values['min']:,} to {values['max']:,}, {most}"
