"""The contact sheet of search results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cloob.pictures import sheet
from cloob.search.records import Hit, Item, valid


def write_sheet(
    path: Path, title: str, remark: str, hits: Iterable[Hit], picture: Callable[[Item], bytes | None]
) -> None:
    """Writes a contact sheet, complete or not at all; ``picture`` gives None if a file is not readable any more."""
    cards = []
    for hit in hits:
        item, margin = hit.item, "" if hit.margin is None else f" · margin {hit.margin:.1f}"
        is_file = os.path.isfile(item.path)  # noqa: PTH113 - a path into a container may be too long for a Path
        cards.append(
            sheet.card(
                picture(item),
                valid(item.caption or ""),
                [f"{hit.score:.3f}{margin}", f"{item.id}: {valid(item.path)}"],
                name=valid(item.path).replace("::", "/").rsplit("/", 1)[-1],
                link=Path(item.path).absolute().as_uri() if is_file else "",
            )
        )
    nothing = [] if cards else [{"remark": "Nothing fits."}]
    sheet.write_sheet(path, valid(title), [{"remark": valid(remark), "cards": cards}, *nothing])
