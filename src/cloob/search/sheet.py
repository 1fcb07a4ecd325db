"""A contact sheet of search results: one HTML file without scripts that needs no other file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cloob.errors import require
from cloob.files import write_whole
from cloob.pictures import Unreadable
from cloob.pictures.thumbnails import data_uri
from cloob.search.records import Hit, Item, valid

_SIDE = 256  # pixels of a thumbnail


def write_sheet(
    path: Path, title: str, remark: str, hits: Iterable[Hit], picture: Callable[[Item], bytes | None]
) -> None:
    """Writes a contact sheet, complete or not at all; ``picture`` gives None if a file is not readable any more."""
    environment = require("jinja2", "train").Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("sheet.html.j2").read_text(encoding="utf-8"))
    cards = [_card(hit, picture(hit.item)) for hit in hits]
    page = template.render(title=valid(title), remark=valid(remark), cards=cards)
    write_whole(path, page, f"{path}: the contact sheet cannot be written here")


def _card(hit: Hit, data: bytes | None) -> dict[str, str]:
    item = hit.item
    try:
        uri = "" if data is None else data_uri(data, _SIDE)
    except Unreadable:
        uri = ""
    is_file = os.path.isfile(item.path)  # noqa: PTH113 - a path into a container may be too long for a Path
    return {
        "uri": uri,
        "link": Path(item.path).absolute().as_uri() if uri and is_file else "",
        "name": valid(item.path).replace("::", "/").rsplit("/", 1)[-1],
        "caption": valid(item.caption or ""),
        "numbers": f"{hit.score:.3f}" + ("" if hit.margin is None else f" · margin {hit.margin:.1f}"),
        "place": f"{item.id}: {valid(item.path)}",
    }
