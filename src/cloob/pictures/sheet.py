"""A contact sheet of pictures: one HTML file without scripts that needs no other file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloob.errors import require
from cloob.files import write_whole
from cloob.pictures.encoded import Unreadable
from cloob.pictures.thumbnails import data_uri

_SIDE = 320  # pixels of a thumbnail


def card(
    picture: bytes | None, caption: str, lines: Sequence[str], *, name: str = "", link: str = ""
) -> dict[str, Any]:
    """A picture, None if it is not readable any more, its caption and lines below it; a click opens the ``link``."""
    try:
        uri = "" if picture is None else data_uri(picture, _SIDE)
    except Unreadable:
        uri = ""
    return {"uri": uri, "link": link if uri else "", "caption": caption, "name": name, "lines": lines}


def write_sheet(path: Path, title: str, sections: Iterable[Mapping[str, Any]]) -> None:
    """Writes a contact sheet, complete or not at all; a section may have ``heading``, ``remark``, ``facts``, ``cards``.

    ``facts`` are names with a sentence each.
    """
    environment = require("jinja2", "train").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("sheet.html.j2").read_text(encoding="utf-8"))
    page = template.render(title=title, sections=list(sections))
    write_whole(path, page, f"{path}: the contact sheet cannot be written here")
