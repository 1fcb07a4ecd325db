"""A survey of a set of pairs: sizes of pictures, lengths of captions, bad samples,
duplicates.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cloob.data.batch import BadSample, RawSample, Skip, caption_id, decoding
from cloob.data.open import spread_rows
from cloob.data.source import Source
from cloob.machine import in_threads
from cloob.pictures import Encoded

_N_EXAMPLES = 3
_N_REPEATED = 10
_AHEAD = 64  # pairs that are decoded early


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


@dataclass(frozen=True)
class Example:
    """A pair that cannot be used, and why."""

    key: str
    detail: str


@dataclass(frozen=True)
class Examples:
    """How many there are, and some of them."""

    count: int
    examples: Sequence[str | Example]


@dataclass(frozen=True)
class Range:
    """The smallest, the median, the 95th percentile and the largest of numbers."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, values: np.ndarray) -> Range:
        if not len(values):
            return cls(0, 0, 0, 0)
        places = np.percentile(values, (0, 50, 95, 100), method="inverted_cdf")
        return cls(*places.tolist())

    def __str__(self) -> str:
        if self.min == self.max:
            return f"{self.min:,}"
        most = f"half of them at most {self.median:,}, 95 % at most {self.p95:,}"
        return f"{self.min:,} to {self.max:,}, {most}"


@dataclass(frozen=True)
class PictureSizes:
    """Sizes of usable pictures; most towers enlarge those ``below_224``."""

    width: Range
    height: Range
    bytes: int
    below_224: int


@dataclass(frozen=True)
class CaptionLengths:
    """Lengths of usable captions, and how many a tower cuts."""

    characters: Range
    tokens: Range
    context_length: int
    cut: int


@dataclass(frozen=True)
class Repeat:
    """How often something occurs, and the text and row of the first."""

    count: int
    text: str
    row: int


@dataclass(frozen=True)
class Repeats:
    """How many could be left out without losing any, and the most frequent."""

    surplus: int
    most: list[Repeat]

    @classmethod
    def of(
        cls, keys: Sequence[Hashable], texts: Sequence[str], rows: Sequence[int]
    ) -> Repeats:
        """Of pairs, by what makes two of them equal."""
        counts = Counter(keys)
        firsts: dict[Hashable, tuple[str, int]] = {}
        for key, text, row in zip(keys, texts, rows, strict=True):
            firsts.setdefault(key, (text, row))
        most = counts.most_common(_N_REPEATED)
        repeated = [Repeat(n, *firsts[key]) for key, n in most if n > 1]
        return cls(len(keys) - len(counts), repeated)


@dataclass(frozen=True)
class Duplicates:
    """Pictures that are equal byte by byte, captions but for case and white space."""

    pictures: Repeats
    captions: Repeats


@dataclass(frozen=True)
class Survey:
    """What was seen of a source, as ``cloob data --json`` prints it."""

    name: str
    rows: int
    shards: int
    looked_at: int
    usable: int
    bad: dict[str, Examples]  # by reason, the most frequent first
    truncated: Examples
    pictures: PictureSizes
    captions: CaptionLengths
    duplicates: Duplicates

    def table(self) -> list[tuple[str, str]]:
        """The lines of ``cloob data``: what was counted, and the count."""
        files = f" in {self.shards:,} files" if self.shards > 1 else ""
        looked_at = f"{self.looked_at:,}"
        if self.looked_at < self.rows:
            looked_at += ", spread over the set (--most 0 looks at all)"
        lines = [
            ("rows", f"{self.rows:,}{files}"),
            ("looked at", looked_at),
            ("usable", f"{self.usable:,}"),
        ]
        lines += [(reason, _counted(bad, "")) for reason, bad in self.bad.items()]
        if self.truncated.count:
            lines.append(("truncated JPEG", _counted(self.truncated, " taken,")))
        return lines + self._lines_of_usable() if self.usable else lines

    def _lines_of_usable(self) -> list[tuple[str, str]]:
        """Sizes, captions, copies."""
        pictures, captions = self.pictures, self.captions
        tokens = "a caption (CLIP's tokeniser, start and end included)"
        cut = f"{captions.cut:,} with more than {captions.context_length} tokens"
        copies = f"{self.duplicates.pictures.surplus:,} copies among captioned pictures"
        repeats = f"{self.duplicates.captions.surplus:,} repeats of another one"
        for most in self.duplicates.captions.most[:1]:
            repeats += f", most of {most.text[:60]!r}"
        return [
            ("width", f"{pictures.width} pixels"),
            ("height", f"{pictures.height} pixels"),
            ("file", f"{pictures.bytes / self.usable / 1e3:,.1f} kB a picture"),
            ("small pictures", f"{pictures.below_224:,} with a side below 224 pixels"),
            ("characters", f"{captions.characters} a caption"),
            ("tokens", f"{captions.tokens} {tokens}"),
            ("cut captions", cut),
            ("equal pictures", f"{copies}, byte by byte"),
            ("equal captions", repeats),
        ]


def _counted(pairs: Examples, how: str) -> str:
    """How many pairs there are, and which, in words."""
    words = []
    for pair in pairs.examples:
        text = pair
        if isinstance(pair, Example):
            text = f"{pair.key} ({pair.detail})" if pair.detail else pair.key
        words.append(str(text))
    return f"{pairs.count:,},{how} such as {', '.join(words)}"


def survey(
    source: Source,
    count_tokens: Callable[[str], int],
    context_length: int,
    *,
    most: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> Survey:
    """Reads and decodes ``most`` pairs, spread over the source, 0: all."""
    rows = spread_rows(source, most) if most else range(len(source))
    pairs: list[Usable] = []
    bad: dict[str, list[Example]] = {}
    looks = in_threads(partial(_look, source), rows, workers, _AHEAD)
    for done, look in enumerate(looks, 1):
        progress(done, len(rows))
        if isinstance(look, Usable):
            pairs.append(look)
        else:
            bad.setdefault(look.reason, []).append(Example(look.key, look.detail))
    most_frequent = sorted(bad.items(), key=lambda item: -len(item[1]))
    return Survey(
        name=source.name,
        rows=len(source),
        shards=len(source.shard_sizes),
        looked_at=len(rows),
        usable=len(pairs),
        bad={reason: _first(examples) for reason, examples in most_frequent},
        truncated=_first([pair.key for pair in pairs if pair.truncated]),
        pictures=_sizes(pairs),
        captions=_lengths(pairs, count_tokens, context_length),
        duplicates=_duplicates(pairs),
    )


def _first(examples: Sequence[str | Example]) -> Examples:
    return Examples(len(examples), examples[:_N_EXAMPLES])


def _sizes(pairs: Sequence[Usable]) -> PictureSizes:
    width = np.array([pair.width for pair in pairs], np.int64)
    height = np.array([pair.height for pair in pairs], np.int64)
    n_small = int((np.minimum(width, height) < 224).sum())
    n_bytes = sum(pair.size for pair in pairs)
    return PictureSizes(Range.of(width), Range.of(height), n_bytes, n_small)


def _lengths(
    pairs: Sequence[Usable], count_tokens: Callable[[str], int], context_length: int
) -> CaptionLengths:
    characters = np.array([len(pair.caption) for pair in pairs], np.int64)
    tokens = np.array([count_tokens(pair.caption) for pair in pairs], np.int64)
    n_cut = int((tokens > context_length).sum())
    return CaptionLengths(Range.of(characters), Range.of(tokens), context_length, n_cut)


def _duplicates(pairs: Sequence[Usable]) -> Duplicates:
    rows = [pair.row for pair in pairs]
    keys = [pair.key for pair in pairs]
    captions = [pair.caption for pair in pairs]
    return Duplicates(
        Repeats.of([pair.content for pair in pairs], keys, rows),
        Repeats.of([caption_id(caption) for caption in captions], captions, rows),
    )


def _look(source: Source, row: int) -> Usable | Skip:
    """A pair, decoded; why it is bad, if it is."""
    try:
        sample: RawSample = source.read(row)
        with decoding(sample.key):
            encoded = Encoded(sample.image)
            width, height = encoded.size
            encoded.rgb()
    except BadSample as bad:
        return bad.skip
    size = len(sample.image)
    content = hashlib.blake2b(sample.image, digest_size=16).digest()
    truncated = encoded.truncated
    key, caption = sample.key, sample.caption
    return Usable(row, key, caption, width, height, size, content, truncated)
