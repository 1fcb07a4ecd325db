"""Pictures in a terminal that can show them: kitty's protocol, iTerm2's, or sixels, by what the environment says."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from cloob.search.show.thumbnails import small

if TYPE_CHECKING:
    from PIL.Image import Image

Protocol = Literal["kitty", "iterm2", "sixel"]

SIDE = 160
"""Pixels of a picture in a terminal."""

_CHUNK = 4096  # bytes of base64 that one of kitty's escapes may hold
_COLOURS = 64
_KITTY = ("xterm-kitty", "xterm-ghostty")
_KITTY_PROGRAMS = ("ghostty",)
_ITERM_PROGRAMS = ("iTerm.app", "WezTerm", "vscode", "mintty")
_SIXEL = ("foot", "mlterm", "contour", "yaft", "xterm-sixel", "sixel")


def protocol(environment: Mapping[str, str], terminal: bool) -> Protocol | None:
    """How pictures reach this terminal.

    Args:
        environment: ``os.environ``; ``CLOOB_PICTURES`` set to a protocol or to ``none`` decides alone.
        terminal: Whether the output is one.

    Returns:
        The protocol; None where the output is no terminal, one that is not known to show pictures, or inside tmux or
        screen, which pass on none of them unless told to.
    """
    if not terminal:
        return None
    asked = environment.get("CLOOB_PICTURES", "")
    if asked:
        return asked if asked in ("kitty", "iterm2", "sixel") else None  # type: ignore[return-value]
    name, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or name.startswith(("screen", "tmux")):
        return None
    if "KITTY_WINDOW_ID" in environment or name in _KITTY or program in _KITTY_PROGRAMS:
        return "kitty"
    if program in _ITERM_PROGRAMS:
        return "iterm2"
    return "sixel" if any(name == known or name.startswith(f"{known}-") for known in _SIXEL) else None


def shown(data: bytes, how: Protocol, side: int = SIDE) -> str:
    """What makes a terminal show a picture.

    Args:
        data: The encoded picture, see :mod:`cloob.pictures`.
        how: The protocol.
        side: Of the square that the picture fits into, pixels.

    Raises:
        cloob.pictures.Unreadable: It does not decode.
    """
    picture = small(data, side)
    if how == "sixel":
        return _sixel(picture)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    encoded = base64.b64encode(stream.getvalue()).decode()
    if how == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(stream.getvalue())}:{encoded}\a"
    parts = [encoded[start : start + _CHUNK] for start in range(0, len(encoded), _CHUNK)]
    escapes = []
    for number, part in enumerate(parts):
        more = int(number < len(parts) - 1)
        escapes.append(f"\x1b_G{'a=T,f=100,' if number == 0 else ''}m={more};{part}\x1b\\")
    return "".join(escapes)


def _sixel(picture: Image) -> str:
    """A picture as sixels: a palette, then bands of six rows in which each colour writes its pixels."""
    paletted = picture.quantize(_COLOURS)
    palette = np.asarray(paletted.getpalette()).reshape(-1, 3)
    pixels = np.asarray(paletted)
    height, width = pixels.shape
    parts = [f'\x1bPq"1;1;{width};{height}']
    parts += [
        f"#{number};2;{';'.join(str(round(value * 100 / 255)) for value in palette[number])}"
        for number in np.unique(pixels).tolist()
    ]
    for top in range(0, height, 6):
        band = pixels[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        for number in np.unique(band).tolist():
            parts.append(f"#{number}{_runs(((band == number) * bits).sum(0).tolist())}$")
        parts.append("-")
    return "".join(parts) + "\x1b\\"


def _runs(columns: list[int]) -> str:
    """Columns of six pixels as characters, equal ones in a row by their number."""
    parts, start = [], 0
    for place in range(1, len(columns) + 1):
        if place == len(columns) or columns[place] != columns[start]:
            count, character = place - start, chr(63 + columns[start])
            parts.append(f"!{count}{character}" if count > 3 else character * count)
            start = place
    return "".join(parts)
