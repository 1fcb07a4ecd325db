"""A survey of a set of pairs: sizes of pictures, lengths of captions, bad samples,
duplicates.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cloob.data.batch import BadSample, RawSample, Skip, caption_id, decoding
from cloob.data.open import spread_rows
from cloob.data.source import Source, spread
from cloob.errors import require
from cloob.files import write_whole
from cloob.machine import in_threads
from cloob.pictures import Encoded, Unreadable, data_uri

_SMALL_SIDE = 224  # pictures with a shorter side are enlarged by most towers
_EXAMPLES = 3
_MOST_REPEATED = 10
_EXCERPT = 100  # characters of a caption's first line
_AHEAD = 64  # pairs that are decoded early
_THUMBNAIL = 320  # pixels of a side
Shown = Callable[[int, int], None]  # shows how many of how many pairs are done


def _repeats(seen: dict[Any, list[Any]]) -> dict[str, Any]:
    """What was seen several times; ``seen`` has the text and the row of the first, and
    the count.
    """
    repeated = [
        {"count": count, "text": text, "row": row}
        for text, row, count in seen.values()
        if count > 1
    ]
    most = sorted(repeated, key=lambda one: (-one["count"], one["row"]))[
        :_MOST_REPEATED
    ]
    return {"surplus": sum(one["count"] - 1 for one in repeated), "most": most}


def survey(
    source: Source,
    count_tokens: Callable[[str], int],
    context_length: int,
    *,
    most: int,
    workers: int,
    progress: Shown,
) -> tuple[dict[str, Any], list[int]]:
    """Reads and decodes ``most`` pairs, spread over the source, 0: all; returns facts
    for JSON, and the usable rows.
    """
    rows = spread_rows(source, most) if most else range(len(source))
    usable: list[int] = []
    bad: dict[str, dict[str, Any]] = {}
    truncated: list[str] = []  # keys of usable pairs with a JPEG that lacks its end
    numbers: list[tuple[int, int, int, int, int]] = []
    pictures: dict[bytes, list[Any]] = {}  # equal byte by byte
    captions: dict[int, list[Any]] = {}  # equal but for case and white space
    looks = in_threads(partial(_look, source), rows, workers, _AHEAD)
    for done, (row, look) in enumerate(zip(rows, looks, strict=True), 1):
        progress(done, len(rows))
        if isinstance(look, Skip):
            fault = bad.setdefault(look.reason, {"count": 0, "examples": []})
            fault["count"] += 1
            if len(fault["examples"]) < _EXAMPLES:
                fault["examples"].append({"key": look.key, "detail": look.detail})
            continue
        sample, size, is_cut = look
        usable.append(row)
        truncated += [sample.key] * is_cut
        text = sample.caption
        numbers.append((*size, len(sample.image), len(text), count_tokens(text)))
        picture = hashlib.blake2b(sample.image, digest_size=16).digest()
        pictures.setdefault(picture, [sample.key, row, 0])[2] += 1
        first = text.partition("\n")[0]
        excerpt = first if len(first) <= _EXCERPT else f"{first[: _EXCERPT - 1]}…"
        captions.setdefault(caption_id(text), [excerpt, row, 0])[2] += 1
    widths, heights, sizes, characters, tokens = (
        np.array(numbers, np.int64).reshape(-1, 5).T
    )
    small = int((np.minimum(widths, heights) < _SMALL_SIDE).sum())
    facts = {
        "name": source.name,
        "rows": len(source),
        "shards": len(source.shard_sizes),
        "looked_at": len(rows),
        "usable": len(usable),
        "bad": bad,
        "truncated": {"count": len(truncated), "examples": truncated[:_EXAMPLES]},
        "pictures": {
            "width": _percentiles(widths),
            "height": _percentiles(heights),
            "bytes": int(sizes.sum()),
        }
        | {f"below_{_SMALL_SIDE}": small},
        "captions": {
            "characters": _percentiles(characters),
            "tokens": _percentiles(tokens),
        }
        | {
            "context_length": context_length,
            "cut": int((tokens > context_length).sum()),
        },
        "duplicates": {"pictures": _repeats(pictures), "captions": _repeats(captions)},
    }
    return facts, usable


def _look(source: Source, row: int) -> tuple[RawSample, tuple[int, int], bool] | Skip:
    try:
        sample = source.read(row)
        with decoding(sample.key):
            encoded = Encoded(sample.image)
            size = encoded.size
            encoded.rgb(upright=False)
    except BadSample as bad:
        return bad.skip
    return sample, size, encoded.truncated


def _percentiles(values: np.ndarray) -> dict[str, int]:
    """The smallest, the median, the 95th percentile and the largest of some numbers;
    empty for none.
    """
    if not len(values):
        return {}
    percentiles = np.percentile(
        values, (0, 50, 95, 100), method="inverted_cdf"
    ).tolist()
    return dict(zip(("min", "median", "p95", "max"), percentiles, strict=True))


def write_sheet(
    path: Path,
    source: Source,
    facts: dict[str, Any],
    usable: list[int],
    lines: Sequence[tuple[str, str]],
    most: int,
) -> None:
    """Writes the contact sheet: ``most`` pairs, spread evenly, and what was seen of all
    of them.
    """
    shown = pair_cards(source, (usable[i] for i in spread(len(usable), most)))
    pictures, captions = (
        facts["duplicates"][kind]["most"] for kind in ("pictures", "captions")
    )
    copies = [
        item
        for repeat in pictures
        for item in pair_cards(source, [repeat["row"]], f"{repeat['count']:,} times")
    ]
    repeats = [(f"{repeat['count']:,} times", repeat["text"]) for repeat in captions]
    sections: list[tuple[str, Any, list[dict[str, Any]]]] = [
        ("", lines, []),
        (f"{len(shown)} pairs, spread evenly over the usable ones", [], shown),
        ("Equal pictures: the same bytes in several pairs", [], copies),
        ("Equal captions", repeats, []),
    ]
    render_sheet(path, facts["name"], sections)


def pair_cards(source: Source, rows: Iterable[int], *more: str) -> list[dict[str, Any]]:
    """Pairs with their pictures, for ``render_sheet``; those that cannot be read are
    left out.
    """
    result = []
    for row in rows:
        with contextlib.suppress(
            BadSample, Unreadable
        ):  # gone or broken since the survey
            pair = source.read(row)
            uri = data_uri(pair.image, _THUMBNAIL)
            result.append(
                {"uri": uri, "caption": pair.caption[:160], "lines": [*more, pair.key]}
            )
    return result


def render_sheet(
    path: Path,
    title: str,
    sections: Sequence[tuple[str, Any, list[dict[str, Any]]]],
    closing: str = "",
    *,
    large: bool = False,
) -> None:
    """Writes a page of sections (heading, facts, cards) and a closing sentence; large
    cards stand nine on a screen.
    """
    environment = require("jinja2", "train").Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        Path(__file__).with_name("sheet.html.j2").read_text(encoding="utf-8")
    )
    html = template.render(title=title, sections=sections, closing=closing, large=large)
    write_whole(path, html)
