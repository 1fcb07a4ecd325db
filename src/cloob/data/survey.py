"""What a set of pairs holds: sizes of pictures, lengths of captions, what is bad, and what is there twice."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cloob.data.batch import BadSample, RawSample, Skip, caption_id, decoding
from cloob.data.open import spread_rows
from cloob.data.source import Source
from cloob.errors import require
from cloob.files import write_whole
from cloob.pictures import Encoded, Unreadable
from cloob.pictures.thumbnails import data_uri

SMALL_SIDE = 224
"""Pictures with a shorter side than this are enlarged by most towers."""

_EXAMPLES = 3
_MOST_REPEATED = 10
_EXCERPT = 100  # characters of a caption's first line
_CHUNK = 64  # pairs in memory at a time
_THUMBNAIL = 320  # pixels of a side
_Pair = tuple[RawSample, tuple[int, int], bool]  # with the size of its picture, and whether that lacks its end


@dataclass
class Repeat:
    """A picture or a caption that occurs so many times."""

    count: int
    text: str  # the caption's first line, cut to 100 characters, or the key of the first such pair
    row: int  # of the first such pair


class Repeats(dict[Any, Repeat]):
    """Counts equal things, and remembers where each was first."""

    def add(self, identity: Any, text: str, row: int) -> None:
        self.setdefault(identity, Repeat(0, text, row)).count += 1

    def most(self) -> list[Repeat]:
        """The most frequent of those that are there more than once."""
        repeated = [one for one in self.values() if one.count > 1]
        return sorted(repeated, key=lambda one: (-one.count, one.row))[:_MOST_REPEATED]

    def as_dict(self) -> dict[str, Any]:
        """How many could go, so that each is there once, and the most frequent."""
        return {"surplus": sum(one.count - 1 for one in self.values()), "most": [asdict(one) for one in self.most()]}


@dataclass
class Survey:
    """What was seen of a set of pairs."""

    name: str
    rows: int  # of the source; the numbers below are of what was looked at
    shards: int
    context_length: int  # tokens that a caption may have, start and end included
    seen: int = 0
    usable: list[int] = field(default_factory=list)  # the rows that are pairs
    widths: list[int] = field(default_factory=list)  # of their pictures, pixels
    heights: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # start and end included, before any is cut
    bytes: int = 0
    bad: dict[str, tuple[int, list[Skip]]] = field(default_factory=dict)  # by reason: how many, and the first of them
    truncated: list[str] = field(default_factory=list)  # keys of usable pairs with a JPEG that lacks its end
    pictures: Repeats = field(default_factory=Repeats)  # equal byte by byte
    captions: Repeats = field(default_factory=Repeats)  # equal but for case and white space

    @property
    def cut(self) -> int:
        """Captions with more tokens than a text tower takes."""
        return sum(count > self.context_length for count in self.tokens)

    @property
    def small(self) -> int:
        """Pictures with a side below ``SMALL_SIDE``."""
        return sum(min(size) < SMALL_SIDE for size in zip(self.widths, self.heights, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """The survey as JSON-able values."""
        return {
            "name": self.name,
            "rows": self.rows,
            "shards": self.shards,
            "looked_at": self.seen,
            "usable": len(self.usable),
            "bad": {
                reason: {"count": count, "examples": [{"key": skip.key, "detail": skip.detail} for skip in examples]}
                for reason, (count, examples) in self.bad.items()
            },
            "truncated": {"count": len(self.truncated), "examples": self.truncated[:_EXAMPLES]},
            "pictures": {
                "width": _spread(self.widths),
                "height": _spread(self.heights),
                "bytes": self.bytes,
                f"below_{SMALL_SIDE}": self.small,
            },
            "captions": {
                "characters": _spread(self.characters),
                "tokens": _spread(self.tokens),
                "context_length": self.context_length,
                "cut": self.cut,
            },
            "duplicates": {"pictures": self.pictures.as_dict(), "captions": self.captions.as_dict()},
        }


def survey(
    source: Source,
    count_tokens: Callable[[str], int],
    context_length: int,
    *,
    most: int = 0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Reads and decodes pairs, and says what they are like.

    ``count_tokens`` counts start and end in. ``most`` rows are looked at, spread evenly over the source (a streamed
    one: over four of its files); 0: all. ``progress`` is called with the rows that were looked at so far and in all.
    """
    rows = list(spread_rows(source, most)) if most else range(len(source))
    result = Survey(source.name, len(source), len(source.shard_sizes), context_length)
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            for row, found in zip(chunk, pool.map(partial(_look, source), chunk), strict=True):
                _add(result, row, found, count_tokens)
            if progress is not None:
                progress(result.seen, len(rows))
    return result


def _look(source: Source, row: int) -> _Pair | Skip:
    try:
        sample = source.read(row)
        with decoding(sample.key):
            encoded = Encoded(sample.image)
            size = encoded.size
            encoded.rgb(upright=False)
    except BadSample as bad:
        return bad.skip
    return sample, size, encoded.truncated


def _add(result: Survey, row: int, found: _Pair | Skip, count_tokens: Callable[[str], int]) -> None:
    result.seen += 1
    if isinstance(found, Skip):
        count, examples = result.bad.get(found.reason, (0, []))
        result.bad[found.reason] = (count + 1, [*examples, found][:_EXAMPLES])
        return
    sample, (width, height), truncated = found
    result.usable.append(row)
    result.widths.append(width)
    result.heights.append(height)
    result.truncated += [sample.key] * truncated
    result.bytes += len(sample.image)
    result.characters.append(len(sample.caption))
    result.tokens.append(count_tokens(sample.caption))
    result.pictures.add(hashlib.blake2b(sample.image, digest_size=16).digest(), sample.key, row)
    first = sample.caption.strip().partition("\n")[0]
    short = first if len(first) <= _EXCERPT else f"{first[: _EXCERPT - 1]}…"
    result.captions.add(caption_id(sample.caption), short, row)


def _spread(values: list[int]) -> dict[str, int]:
    """The smallest, the median, the 95th percentile and the largest of some numbers; empty for none."""
    if not values:
        return {}
    low, median, high, top = np.percentile(values, (0, 50, 95, 100), method="inverted_cdf").tolist()
    return {"min": low, "median": median, "p95": high, "max": top}


def write_sheet(
    path: Path, source: Source, survey: Survey, facts: Sequence[tuple[str, str]], pictures: int = 60
) -> None:
    """Writes the contact sheet, one HTML file: some pairs, spread evenly, and what was seen of all of them."""

    def cards(rows: Iterable[int], *more: str) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            with contextlib.suppress(BadSample, Unreadable):  # gone or broken since the survey
                pair = source.read(row)
                uri = data_uri(pair.image, _THUMBNAIL)
                found.append({"uri": uri, "caption": pair.caption[:160], "lines": [*more, pair.key]})
        return found

    usable = survey.usable
    count = min(pictures, len(usable))
    shown = cards(usable[i * (len(usable) - 1) // max(1, count - 1)] for i in range(count))
    copies = [each for repeat in survey.pictures.most() for each in cards([repeat.row], f"{repeat.count:,} times")]
    captions = [(f"{repeat.count:,} times", repeat.text) for repeat in survey.captions.most()]
    sections = [
        ("", facts, []),
        (f"{len(shown)} pairs, spread evenly over the usable ones", [], shown),
        ("Equal pictures: the same bytes in several pairs", [], copies),
        ("Equal captions", captions, []),
    ]
    environment = require("jinja2", "train").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("sheet.html.j2").read_text(encoding="utf-8"))
    write_whole(path, template.render(title=survey.name, sections=sections))
