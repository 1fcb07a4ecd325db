"""A contact sheet of what a search found: one HTML file that needs no other, and runs nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from cloob.files import write_whole
from cloob.search.records import Hit, Item, valid
from cloob.search.show.thumbnails import data_uri

_CSS = """
:root { color-scheme: light dark; --ink: #1b1c1e; --quiet: #5d6167; --paper: #fbfbfa; --hair: #d9dadc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --quiet: #a3a7ad; --paper: #17181a; --hair: #393b3f; } }
body { margin: 0 auto; max-width: 1280px; padding: 28px 20px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 4px; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); }
ul { list-style: none; margin: 24px 0 0; padding: 0; display: grid; gap: 20px 14px;
  grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); }
li { min-width: 0; font-size: .86rem; break-inside: avoid; }
.frame { aspect-ratio: 1; display: grid; place-items: center; background: #fff; color: #5d6167; overflow: hidden;
  border-radius: 5px; box-shadow: 0 0 0 1px var(--hair); }
.frame img { width: 100%; height: 100%; object-fit: contain; min-height: 0; }
li p { margin: 6px 0 0; overflow-wrap: anywhere; }
@media (max-width: 480px) { ul { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""


def write_sheet(
    path: Path, title: str, said: str, hits: Iterable[Hit], picture: Callable[[Item], bytes | None]
) -> None:
    """Writes a contact sheet.

    Args:
        path: The file; it appears complete or not at all.
        title: What was searched for.
        said: One line under it: how many, of how many.
        hits: What was found, best first.
        picture: Gives a picture's file; None where it is not readable any more.

    Raises:
        InputError: ``path`` cannot be written.
    """
    cards = "\n".join(_card(hit, picture(hit.item)) for hit in hits)
    body = f"<ul>\n{cards}\n</ul>" if cards else "<p>Nothing fits.</p>"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p class="quiet">{_text(said)}</p>
{body}
</main>
</body>
</html>
"""
    write_whole(path, page, f"{path}: the contact sheet cannot be written here")


def _card(hit: Hit, data: bytes | None) -> str:
    from cloob.pictures import Unreadable  # Pillow

    item = hit.item
    name = item.path.replace("::", "/").rsplit("/", 1)[-1]
    try:
        shown = f'<img src="{data_uri(data)}" alt="{_text(item.caption or name)}">' if data is not None else None
    except Unreadable:
        shown = None
    margin = "" if hit.margin is None else f" · margin {hit.margin:.1f}"
    caption = f"<p>{_text(item.caption[:160])}</p>" if item.caption else ""
    frame = shown or "<span>not readable any more</span>"
    if shown and os.path.isfile(item.path):  # noqa: PTH113 - a path into a container may be too long for a Path
        frame = f'<a href="{escape(Path(item.path).absolute().as_uri())}">{shown}</a>'
    where = f'<p class="quiet">{hit.score:.3f}{margin}<br>{item.id}: {_text(item.path)}</p>'
    return f'<li><div class="frame">{frame}</div>{caption}{where}</li>'


def _text(text: str) -> str:
    """Escaped, and without what is no text (bytes of a file name that are not UTF-8)."""
    return escape(valid(text))
