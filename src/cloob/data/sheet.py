"""A page of pictures with captions, in one file."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloob.data.batch import BadSample
from cloob.data.source import Source
from cloob.errors import require
from cloob.files import write_whole
from cloob.pictures import Unreadable, data_uri

_THUMBNAIL = 320  # pixels of a side
_MOST = 160  # characters of a caption


@dataclass(frozen=True)
class Card:
    """A picture with its caption on a page, and lines below it."""

    uri: str
    caption: str
    lines: Sequence[str]


def pair_cards(source: Source, row: int, *lines: str) -> list[Card]:
    """The card of a pair with its key; none where it cannot be read any more."""
    with contextlib.suppress(BadSample, Unreadable):
        pair = source.read(row)
        uri = data_uri(pair.image, _THUMBNAIL)
        return [Card(uri, pair.caption[:_MOST], (*lines, pair.key))]
    return []


def write_sheet(
    path: Path, title: str, heading: str, cards: Sequence[Card], closing: str
) -> None:
    """Writes a page of cards, nine a screen, and a closing sentence."""
    environment = require("jinja2", "train").Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        Path(__file__).with_name("sheet.html.j2").read_text(encoding="utf-8")
    )
    html = template.render(title=title, heading=heading, cards=cards, closing=closing)
    write_whole(path, html)
