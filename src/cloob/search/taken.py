"""When, with what and where a picture was taken: a column, EXIF, the file's name, the file's time."""

from __future__ import annotations

import contextlib
import os
import re
from datetime import date, datetime
from typing import TYPE_CHECKING

from cloob.search.records import Value

if TYPE_CHECKING:
    from PIL.Image import Exif

_EXIF, _GPS, _TAKEN, _CHANGED, _MAKE, _MODEL = 0x8769, 0x8825, 0x9003, 0x0132, 0x010F, 0x0110
_DATE = re.compile(r"(\d{4})(?:-(\d\d)|[-/.:](\d\d?)[-/.:](\d\d?)(?:[T ](\d\d:\d\d(?::\d\d)?\S*))?)?")
_TIME = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d)?(?![:\d])")
_NAMED = re.compile(  # IMG-20240101-WA0000, 20240101_120000, IMG20240101120000, Screenshot 2024-01-01 at 12.00.00
    r"(?<!\d)((?:19|20)\d\d)([-_.]?)(\d\d)\2(\d\d)"
    r"(?:(?:[-_T ]| at |(?<=\d{8}))([01]\d|2[0-3])[-_.]?([0-5]\d)[-_.]?([0-5]\d)\d*)?(?!\d)"
)


def date_of(path: str, stated: Value, exif: Exif | None, by_takeout: Value = None) -> tuple[str | None, Value]:
    """ISO 8601 without a time zone: as stated in a column, or by EXIF, Takeout, the file's name, else its time here.

    Also ``exif``, ``takeout`` or ``name``, if it is from there. Where a date is stated that cannot be read, none of
    these is taken for it.
    """
    is_stated = stated not in (None, "")
    if is_stated and (found := iso_date(stated)):
        return found, None
    if found := _by_exif(exif):
        return found, "exif"
    if is_stated:
        return None, None
    if by_takeout:
        return str(by_takeout), "takeout"
    if found := _by_name(path):
        return found, "name"
    with contextlib.suppress(OSError, ValueError, OverflowError):  # a member of a container has none
        return datetime.fromtimestamp(os.stat(path).st_mtime).isoformat(timespec="seconds"), None  # noqa: PTH116
    return None, None


def iso_date(stated: Value) -> str | None:
    """ISO 8601 of a date that begins with the year: ``2024``, ``20240601``, ``2024/6/1 10:00``."""
    text = str(int(stated) if isinstance(stated, float) and stated.is_integer() else stated).strip("\0 ")
    if len(text) == 8 and text.isdecimal():
        text = f"{text[:4]}-{text[4:6]}-{text[6:]}"
    if (match := _DATE.fullmatch(text)) is None:
        return None
    year, *parts = [int(part) for part in match.groups()[:4] if part]
    try:
        date(year, *[*parts, 1, 1][:2])
    except ValueError:
        return None
    day = "-".join([f"{year:04}", *(f"{part:02}" for part in parts)])
    return f"{day}T{match[5]}" if match[5] and _TIME.match(match[5]) else day  # 24:00:00 is none


def _by_exif(exif: Exif | None) -> str | None:
    with contextlib.suppress(Exception):  # Pillow raises nearly anything on damaged EXIF
        for raw in [] if exif is None else [exif.get_ifd(_EXIF).get(_TAKEN), exif.get(_CHANGED)]:
            taken = iso_date(raw) if isinstance(raw, str) else None
            if taken is not None and int(taken[:4]) <= date.today().year + 1:  # a camera without a clock
                return taken
    return None


def _by_name(path: str) -> str | None:
    for match in _NAMED.finditer(re.split(r"/|\\|::", path)[-1]):
        year, _, month, day, *time = match.groups()
        if found := iso_date(f"{year}-{month}-{day}"):
            return f"{found}T{':'.join(time)}" if time[0] else found
    return None


def camera_and_place(exif: Exif | None) -> dict[str, Value]:
    """The columns ``camera``, ``latitude`` and ``longitude``, as far as EXIF has them."""
    found: dict[str, Value] = {}
    with contextlib.suppress(Exception):  # as above
        make, model = (str(exif.get(tag) or "").strip("\0 ") if exif else "" for tag in (_MAKE, _MODEL))
        if camera := model if model.startswith(make) else f"{make} {model}".strip():
            found["camera"] = camera
        gps = exif.get_ifd(_GPS) if exif else {}
        for name, reference, below in (("latitude", 1, "S"), ("longitude", 3, "W")):
            degrees, minutes, seconds = map(float, gps[reference + 1])
            sign = -1 if gps[reference] == below else 1
            found[name] = round(sign * (degrees + minutes / 60 + seconds / 3600), 6)
    return found
