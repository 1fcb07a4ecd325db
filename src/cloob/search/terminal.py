"""Pictures in terminals that show them, by the protocol of kitty or of iTerm2."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Literal

Protocol = Literal["kitty", "iterm2"]

_SIDE = 160  # pixels
_CHUNK = 4096  # bytes of base64 in one of kitty's escapes
_KITTY_TERMS = ("xterm-kitty", "xterm-ghostty")
_ITERM_PROGRAMS = ("iTerm.app", "WezTerm", "vscode", "mintty")


def protocol(environment: Mapping[str, str], terminal: bool) -> Protocol | None:
    """How this terminal shows pictures; None where it does not, or the output is no terminal.

    ``CLOOB_PICTURES`` decides where it is set: ``kitty``, ``iterm2`` or ``none``.
    """
    asked, name = environment.get("CLOOB_PICTURES"), environment.get("TERM", "")
    if not terminal:
        return None
    if asked:
        return asked if asked in ("kitty", "iterm2") else None  # type: ignore[return-value]
    if "TMUX" in environment or name.startswith(("screen", "tmux")):  # they do not pass pictures on
        return None
    if "KITTY_WINDOW_ID" in environment or name in _KITTY_TERMS:
        return "kitty"
    return "iterm2" if environment.get("TERM_PROGRAM") in _ITERM_PROGRAMS else None


def shown(picture: bytes, how: Protocol) -> str:
    """The escapes that show a picture file; raises :class:`cloob.pictures.Unreadable` where it does not decode."""
    from cloob.pictures.thumbnails import thumbnail  # Pillow

    data = thumbnail(picture, _SIDE, "PNG")
    text = base64.b64encode(data).decode()
    if how == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(data)}:{text}\a"
    parts = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    keys = ["a=T,f=100,", *[""] * (len(parts) - 1)]
    more = [*[1] * (len(parts) - 1), 0]
    return "".join(f"\x1b_G{key}m={m};{part}\x1b\\" for key, m, part in zip(keys, more, parts, strict=True))
