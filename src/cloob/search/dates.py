"""When a picture was taken: a column ``date``, else EXIF, else the file's time."""

from __future__ import annotations

import contextlib
import os
import re
from datetime import date, datetime

from PIL.Image import Exif

from cloob.search.records import Value

_EXIF, _TAKEN, _CHANGED = 0x8769, 0x9003, 0x0132  # tags
# 2024, 2024-06, 20240601, 2024/6/1, 2024:06:01 10:00:00; 24:00:00 is no time
_DATE = re.compile(
    r"(\d{4})(?:-(\d\d)|(\d\d)(\d\d)|[-/.:](\d\d?)[-/.:](\d\d?)"
    r"(?:[T ](?:((?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d)?(?![:\d])\S*)|\d\d:\d\d\S*))?)?"
)


def date_of(path: str, stated: Value, exif: Exif | None) -> str | None:
    """The ISO 8601 date; a column that is filled is not replaced by another date."""
    if stated not in (None, ""):
        return iso_date(stated)
    return _exif_date(exif) or _file_date(path)


def iso_date(stated: Value) -> str | None:
    """ISO 8601 of a date that begins with the year: ``2024``, ``20240601``, ``2024/6/1
    10:00``.
    """
    if isinstance(stated, float) and stated.is_integer():
        stated = int(stated)
    match = _DATE.fullmatch(str(stated).strip("\0 "))
    if match is None:
        return None
    year, *parts = [int(part) for part in match.groups()[:6] if part]
    with contextlib.suppress(ValueError):
        date(year, *[*parts, 1, 1][:2])
        day = "-".join([f"{year:04}", *(f"{part:02}" for part in parts)])
        return f"{day}T{match[7]}" if match[7] else day
    return None


def _exif_date(exif: Exif | None) -> str | None:
    """When a picture was taken as EXIF has it; None of what is damaged or in the
    future.
    """
    if exif is None:
        return None
    with contextlib.suppress(Exception):  # Pillow raises nearly anything on damage
        for raw in (exif.get_ifd(_EXIF).get(_TAKEN), exif.get(_CHANGED)):
            taken = iso_date(str(raw))
            if taken and int(taken[:4]) <= date.today().year + 1:  # a clock that is set
                return taken
    return None


def _file_date(path: str) -> str | None:
    with contextlib.suppress(OSError, ValueError, OverflowError):
        changed = datetime.fromtimestamp(os.stat(path).st_mtime)  # noqa: PTH116
        return changed.isoformat(timespec="seconds")
    return None
