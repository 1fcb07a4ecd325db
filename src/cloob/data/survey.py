"""A survey of a set of pairs: sizes of pictures, lengths of captions, bad samples,
duplicates.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cloob.data.batch import BadSample, Skip, decoding
from cloob.data.open import spread_rows
from cloob.data.source import Source
from cloob.machine import in_threads
from cloob.pictures import Encoded

SMALL_SIDE = 224  # pictures with a shorter side are enlarged by most towers
_N_EXAMPLES = 3
_AHEAD = 64  # pairs that are decoded early


@dataclass(frozen=True)
class Pair:
    """What is counted of a usable pair."""

    key: str
    caption: str
    width: int  # pixels
    height: int
    size: int  # of the file, bytes
    content: bytes  # a digest of them
    truncated: bool  # a JPEG without its end


@dataclass(frozen=True)
class Examples:
    """How many there are, and some of them."""

    count: int
    examples: list[str]


@dataclass(frozen=True)
class Range:
    """The smallest, the median, the 95th percentile and the largest of some
    numbers.
    """

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
class Survey:
    """What was seen of a source; all from ``truncated`` on is of its usable pairs."""

    name: str
    rows: int
    files: int
    looked_at: int
    usable: int
    bad: dict[str, Examples]  # by reason
    truncated: Examples
    width: Range
    height: Range
    bytes: int
    small_pictures: int
    characters: Range
    tokens: Range
    context_length: int  # tokens that a tower takes of a caption
    cut_captions: int
    # that could be left out without losing any; captions equal but for case and space
    equal_pictures: int
    equal_captions: int
    most_frequent: list[str]  # caption, if any

    def table(self) -> list[tuple[str, str]]:
        """The lines of ``cloob data``: what was counted, and the count."""
        files = f" in {self.files:,} files" if self.files > 1 else ""
        looked_at = f"{self.looked_at:,}"
        if self.looked_at < self.rows:
            looked_at += ", spread over the set (--most 0 looks at all)"
        rows = [
            ("rows", f"{self.rows:,}{files}"),
            ("looked at", looked_at),
            ("usable", f"{self.usable:,}"),
        ]
        for reason, bad in self.bad.items():
            rows.append((reason, f"{bad.count:,}, such as {', '.join(bad.examples)}"))
        return rows + (self._table_of_usable() if self.usable else [])

    def _table_of_usable(self) -> list[tuple[str, str]]:
        """Sizes, captions, copies."""
        rows = []
        if self.truncated.count:
            examples = ", ".join(self.truncated.examples)
            taken = f"{self.truncated.count:,}, taken, such as {examples}"
            rows.append(("truncated JPEG", taken))
        small = f"{self.small_pictures:,} with a side below {SMALL_SIDE} pixels"
        tokens = "a caption (CLIP's tokeniser, start and end included)"
        cut = f"{self.cut_captions:,} with more than {self.context_length} tokens"
        copies = f"{self.equal_pictures:,} copies among captioned pictures"
        repeats = f"{self.equal_captions:,} repeats of another one"
        if self.equal_captions:
            repeats += f", most of {self.most_frequent[0][:60]!r}"
        return [
            *rows,
            ("width", f"{self.width} pixels"),
            ("height", f"{self.height} pixels"),
            ("file", f"{self.bytes / self.usable / 1e3:,.1f} kB a picture"),
            ("small pictures", small),
            ("characters", f"{self.characters} a caption"),
            ("tokens", f"{self.tokens} {tokens}"),
            ("cut captions", cut),
            ("equal pictures", f"{copies}, byte by byte"),
            ("equal captions", repeats),
        ]


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
    pairs: list[Pair] = []
    skips: list[Skip] = []
    looks = in_threads(partial(_look, source), rows, workers, _AHEAD)
    for done, look in enumerate(looks, 1):
        progress(done, len(rows))
        if isinstance(look, Pair):
            pairs.append(look)
        else:
            skips.append(look)
    measured = [
        (p.width, p.height, p.size, len(p.caption), count_tokens(p.caption))
        for p in pairs
    ]
    width, height, size, characters, tokens = (
        np.array(measured, np.int64).reshape(-1, 5).T
    )
    captions = Counter(" ".join(pair.caption.casefold().split()) for pair in pairs)
    return Survey(
        name=source.name,
        rows=len(source),
        files=len(source.shard_sizes),
        looked_at=len(rows),
        usable=len(pairs),
        bad=_by_reason(skips),
        truncated=_examples([pair.key for pair in pairs if pair.truncated]),
        width=Range.of(width),
        height=Range.of(height),
        bytes=int(size.sum()),
        small_pictures=int((np.minimum(width, height) < SMALL_SIDE).sum()),
        characters=Range.of(characters),
        tokens=Range.of(tokens),
        context_length=context_length,
        cut_captions=int((tokens > context_length).sum()),
        equal_pictures=len(pairs) - len({pair.content for pair in pairs}),
        equal_captions=len(pairs) - len(captions),
        most_frequent=[text for text, _ in captions.most_common(1)],
    )


def _by_reason(skips: Sequence[Skip]) -> dict[str, Examples]:
    """What cannot be used, the most frequent reason first."""
    by_reason: dict[str, list[str]] = {}
    for skip in skips:
        detail = f" ({skip.detail})" if skip.detail else ""
        by_reason.setdefault(skip.reason, []).append(f"{skip.key}{detail}")
    by_number = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return {reason: _examples(keys) for reason, keys in by_number}


def _examples(keys: Sequence[str]) -> Examples:
    return Examples(len(keys), list(keys[:_N_EXAMPLES]))


def _look(source: Source, row: int) -> Pair | Skip:
    """A pair, decoded; why it is bad, if it is."""
    try:
        sample = source.read(row)
        with decoding(sample.key):
            encoded = Encoded(sample.image)
            width, height = encoded.size
            encoded.rgb(upright=False)
    except BadSample as bad:
        return bad.skip
    content = hashlib.blake2b(sample.image, digest_size=16).digest()
    sizes = width, height, len(sample.image)
    return Pair(sample.key, sample.caption, *sizes, content, encoded.truncated)
