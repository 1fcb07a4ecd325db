"""A survey of a set of pairs: sizes of pictures, lengths of captions, bad samples,
duplicates.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cloob.data.batch import BadSample, RawSample, Skip, caption_id, decoding
from cloob.data.open import spread_rows
from cloob.data.source import Source, spread
from cloob.errors import require
from cloob.files import write_whole
from cloob.machine import in_threads
from cloob.pictures import Encoded, Unreadable, data_uri

_SMALL_SIDE = 224  # pictures with a shorter side are enlarged by most towers
_N_EXAMPLES = 3
_N_REPEATED = 10
_EXCERPT = 100  # characters of a caption's first line
_AHEAD = 64  # pairs that are decoded early
_THUMBNAIL = 320  # pixels of a side
Shown = Callable[[int, int], None]  # shows how many of how many pairs are done
TableRows = Sequence[tuple[str, str]]  # a label and a sentence each


@dataclass
class Repeat:
    """How often something occurs, and the text and row of the first."""

    count: int
    text: str
    row: int


@dataclass
class Occurrences:
    """Pictures or captions, by what makes two of them equal."""

    by_key: dict[bytes | int, Repeat] = field(default_factory=dict)

    def add(self, key: bytes | int, text: str, row: int) -> None:
        self.by_key.setdefault(key, Repeat(0, text, row)).count += 1

    def most(self) -> list[Repeat]:
        """What is repeated most often."""
        repeated = [item for item in self.by_key.values() if item.count > 1]
        return sorted(repeated, key=lambda item: (-item.count, item.row))[:_N_REPEATED]

    def surplus(self) -> int:
        """How many could be left out without losing any."""
        return sum(item.count - 1 for item in self.by_key.values())


@dataclass(frozen=True)
class Numbers:
    """Numbers of the usable pairs, (n,) int64 each."""

    width: np.ndarray  # pixels
    height: np.ndarray
    bytes: np.ndarray  # of the file
    characters: np.ndarray  # of the caption
    tokens: np.ndarray

    def n_small(self) -> int:
        """How many pictures are small."""
        return int((np.minimum(self.width, self.height) < _SMALL_SIDE).sum())


@dataclass
class Survey:
    """What was seen of a source."""

    name: str
    rows: int
    shards: int
    looked_at: int
    context_length: int  # tokens that a tower takes of a caption
    usable: list[int] = field(default_factory=list)  # rows
    bad: dict[str, list[Skip]] = field(default_factory=dict)  # by reason
    # keys of usable pairs with a JPEG that lacks its end
    truncated: list[str] = field(default_factory=list)
    pictures: Occurrences = field(default_factory=Occurrences)  # equal byte by byte
    # equal but for case and white space
    captions: Occurrences = field(default_factory=Occurrences)
    measured: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def numbers(self) -> Numbers:
        return Numbers(*np.array(self.measured, np.int64).reshape(-1, 5).T)

    def n_cut(self) -> int:
        """How many captions have more tokens than a tower takes."""
        return int((self.numbers().tokens > self.context_length).sum())

    def as_json(self) -> dict[str, Any]:
        """What ``cloob data --json`` prints."""
        numbers = self.numbers()
        bad = {}
        for reason, skips in self.bad.items():
            examples = [{"key": s.key, "detail": s.detail} for s in _few(skips)]
            bad[reason] = {"count": len(skips), "examples": examples}
        repeats = {}
        for name, seen in (("pictures", self.pictures), ("captions", self.captions)):
            most = [asdict(item) for item in seen.most()]
            repeats[name] = {"surplus": seen.surplus(), "most": most}
        return {
            "name": self.name,
            "rows": self.rows,
            "shards": self.shards,
            "looked_at": self.looked_at,
            "usable": len(self.usable),
            "bad": bad,
            "truncated": {
                "count": len(self.truncated),
                "examples": self.truncated[:_N_EXAMPLES],
            },
            "pictures": {
                "width": _percentiles(numbers.width),
                "height": _percentiles(numbers.height),
                "bytes": int(numbers.bytes.sum()),
                f"below_{_SMALL_SIDE}": numbers.n_small(),
            },
            "captions": {
                "characters": _percentiles(numbers.characters),
                "tokens": _percentiles(numbers.tokens),
                "context_length": self.context_length,
                "cut": self.n_cut(),
            },
            "duplicates": repeats,
        }

    def table(self) -> list[tuple[str, str]]:
        """The lines of ``cloob data``: what was counted, and the count."""
        files = f" in {self.shards:,} files" if self.shards > 1 else ""
        looked_at = f"{self.looked_at:,}"
        if self.looked_at < self.rows:
            looked_at += ", spread over the set (--most 0 looks at all)"
        rows = [
            ("rows", f"{self.rows:,}{files}"),
            ("looked at", looked_at),
            ("usable", f"{len(self.usable):,}"),
        ]
        by_number = sorted(self.bad.items(), key=lambda item: -len(item[1]))
        for reason, skips in by_number:
            examples = ", ".join(skip.key for skip in _few(skips))
            why = f" ({skips[0].detail})" if skips[0].detail else ""
            rows.append((reason, f"{len(skips):,}, such as {examples}{why}"))
        if self.truncated:
            examples = ", ".join(self.truncated[:_N_EXAMPLES])
            taken = f"{len(self.truncated):,}, taken, such as {examples}"
            rows.append(("truncated JPEG", taken))
        return rows + (self._rows_of_usable() if self.usable else [])

    def _rows_of_usable(self) -> list[tuple[str, str]]:
        """The lines of the table on pairs that can be used: sizes, captions, copies."""
        numbers = self.numbers()
        small = f"{numbers.n_small():,} with a side below {_SMALL_SIDE} pixels"
        tokens = "a caption (CLIP's tokeniser, start and end included)"
        cut = f"{self.n_cut():,} with more than {self.context_length} tokens"
        copies = f"{self.pictures.surplus():,} copies among captioned pictures"
        repeats = f"{self.captions.surplus():,} repeats of another one"
        for item in self.captions.most()[:1]:
            repeats += f"; {item.count:,} are {item.text[:60]!r}"
        return [
            ("width", f"{_range(numbers.width)} pixels"),
            ("height", f"{_range(numbers.height)} pixels"),
            ("file", f"{numbers.bytes.mean() / 1e3:,.1f} kB a picture"),
            ("small pictures", small),
            ("characters", f"{_range(numbers.characters)} a caption"),
            ("tokens", f"{_range(numbers.tokens)} {tokens}"),
            ("cut captions", cut),
            ("equal pictures", f"{copies}, byte by byte"),
            ("equal captions", repeats),
        ]


def _few(skips: list[Skip]) -> list[Skip]:
    return skips[:_N_EXAMPLES]


def _percentiles(values: np.ndarray) -> dict[str, int]:
    """The smallest, the median, the 95th percentile and the largest of some numbers;
    empty for none.
    """
    if not len(values):
        return {}
    found = np.percentile(values, (0, 50, 95, 100), method="inverted_cdf").tolist()
    return dict(zip(("min", "median", "p95", "max"), found, strict=True))


def _range(values: np.ndarray) -> str:
    low, half, most, high = (f"{value:,}" for value in _percentiles(values).values())
    if low == high:
        return low
    return f"{low} to {high}, half of them at most {half}, 95 % at most {most}"


def survey(
    source: Source,
    count_tokens: Callable[[str], int],
    context_length: int,
    *,
    most: int,
    workers: int,
    progress: Shown,
) -> Survey:
    """Reads and decodes ``most`` pairs, spread over the source, 0: all."""
    rows = spread_rows(source, most) if most else list(range(len(source)))
    n, n_shards = len(source), len(source.shard_sizes)
    seen = Survey(source.name, n, n_shards, len(rows), context_length)
    looks = in_threads(partial(_look, source), rows, workers, _AHEAD)
    for done, (row, look) in enumerate(zip(rows, looks, strict=True), 1):
        progress(done, len(rows))
        if isinstance(look, Skip):
            seen.bad.setdefault(look.reason, []).append(look)
            continue
        sample, (width, height), is_cut = look
        text, key = sample.caption, sample.key
        seen.usable.append(row)
        if is_cut:
            seen.truncated.append(key)
        lengths = len(sample.image), len(text), count_tokens(text)
        seen.measured.append((width, height, *lengths))
        content = hashlib.blake2b(sample.image, digest_size=16).digest()
        seen.pictures.add(content, key, row)
        seen.captions.add(caption_id(text), _excerpt(text), row)
    return seen


def _look(source: Source, row: int) -> tuple[RawSample, tuple[int, int], bool] | Skip:
    """A pair with its picture's size and whether its JPEG is truncated; why it is bad,
    if it is.
    """
    try:
        sample = source.read(row)
        with decoding(sample.key):
            encoded = Encoded(sample.image)
            size = encoded.size
            encoded.rgb(upright=False)
    except BadSample as bad:
        return bad.skip
    return sample, size, encoded.truncated


def _excerpt(text: str) -> str:
    first = text.partition("\n")[0]
    return first if len(first) <= _EXCERPT else f"{first[: _EXCERPT - 1]}…"


@dataclass(frozen=True)
class Card:
    """A picture with its caption on a page."""

    uri: str
    caption: str
    lines: list[str]


class Section(NamedTuple):
    """A part of a page."""

    heading: str
    table: TableRows = ()
    cards: Sequence[Card] = ()


def write_sheet(path: Path, source: Source, seen: Survey, most: int) -> None:
    """Writes the contact sheet: ``most`` pairs, spread evenly, and what was seen of all
    of them.
    """
    rows = [seen.usable[place] for place in spread(len(seen.usable), most)]
    shown = pair_cards(source, rows)
    copies: list[Card] = []
    for item in seen.pictures.most():
        copies += pair_cards(source, [item.row], f"{item.count:,} times")
    repeats = [(f"{item.count:,} times", item.text) for item in seen.captions.most()]
    sections = [
        Section("", seen.table()),
        Section(f"{len(shown)} pairs, spread evenly over the usable ones", (), shown),
        Section("Equal pictures: the same bytes in several pairs", (), copies),
        Section("Equal captions", repeats),
    ]
    render_sheet(path, seen.name, sections)


def pair_cards(source: Source, rows: Iterable[int], *lines: str) -> list[Card]:
    """Pairs with their pictures, for ``render_sheet``; those that cannot be read are
    left out.
    """
    cards = []
    for row in rows:
        # gone or broken since the survey
        with contextlib.suppress(BadSample, Unreadable):
            pair = source.read(row)
            uri = data_uri(pair.image, _THUMBNAIL)
            cards.append(Card(uri, pair.caption[:160], [*lines, pair.key]))
    return cards


def render_sheet(
    path: Path,
    title: str,
    sections: Sequence[Section],
    closing: str = "",
    *,
    large: bool = False,
) -> None:
    """Writes a page of sections and a closing sentence; large cards stand nine on a
    screen.
    """
    environment = require("jinja2", "train").Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        Path(__file__).with_name("sheet.html.j2").read_text(encoding="utf-8")
    )
    html = template.render(title=title, sections=sections, closing=closing, large=large)
    write_whole(path, html)
