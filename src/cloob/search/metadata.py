"""What describes a picture: EXIF, XMP and IPTC in its file, ``.xmp`` and Google
Takeout's ``.json`` next to it, names.

The columns are ``camera``, ``latitude``, ``longitude``, ``tags``, ``rating`` and
``caption``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable
from datetime import date, datetime
from typing import Any
from xml.etree import ElementTree

from PIL import IptcImagePlugin
from PIL.Image import Exif

from cloob.files import TooLarge, read_at_most
from cloob.pictures import Encoded
from cloob.search.records import Value

MOST_BYTES = 8 * 1024 * 1024
# of a.jpg it is a.jpg.json, or a.jpg.supplemental-metadata.json, perhaps cut
TAKEOUT = r"(?:\.s[\w-]*)?\.json"
TAKEN = "date of Takeout"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_RATING = "{http://ns.adobe.com/xap/1.0/}Rating"
_IPTC = (
    ("tags", (2, 25), ", "),
    ("caption", (2, 120), " "),
)  # a column, its key, and what joins several
_EXIF, _GPS, _TAKEN, _CHANGED, _MAKE, _MODEL = (
    0x8769,
    0x8825,
    0x9003,
    0x0132,
    0x010F,
    0x0110,
)
# 2024, 2024-06, 20240601, 2024/6/1, 2024:06:01 10:00:00; 24:00:00 is no time
_DATE = re.compile(
    r"(\d{4})(?:-(\d\d)|(\d\d)(\d\d)|[-/.:](\d\d?)[-/.:](\d\d?)"
    r"(?:[T ](?:((?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d)?(?![:\d])\S*)|\d\d:\d\d\S*))?)?"
)
# IMG-20240101-WA0000, 20240101_120000, IMG20240101120000, Screenshot 2024-01-01 at
# 12.00.00
_NAMED = re.compile(
    r"(?<!\d)((?:19|20)\d\d)([-_.]?)(\d\d)\2(\d\d)"
    r"(?:(?:[-_T ]| at"
    r" |(?<=\d{8}))([01]\d|2[0-3])[-_.]?([0-5]\d)[-_.]?([0-5]\d)\d*)?(?!\d)"
)


def read_beside(paths: Iterable[str]) -> dict[str, Any]:
    """What files next to a picture state; nothing of one that cannot be read or is
    something else.
    """
    columns: dict[str, Any] = {}
    for path in paths:
        with contextlib.suppress(OSError, TooLarge):
            data = read_at_most(path, MOST_BYTES)
            if path.lower().endswith(".xmp"):
                columns |= of_xmp(data)
                continue
            with contextlib.suppress(
                ValueError,
                TypeError,
                KeyError,
                AttributeError,
                OverflowError,
                RecursionError,
            ):
                raw: dict[str, Any] = json.loads(data)
                taken = datetime.fromtimestamp(
                    int(raw["photoTakenTime"]["timestamp"])
                )  # of UTC, in local time
                columns[TAKEN] = taken.isoformat(timespec="seconds")
                place = {
                    name: float(raw.get("geoData", {}).get(name, 0))
                    for name in ("latitude", "longitude")
                }
                columns |= place if any(place.values()) else {}
                columns |= (
                    {"caption": caption}
                    if (caption := str(raw.get("description") or "").strip())
                    else {}
                )
    return columns


def of_file(encoded: Encoded) -> tuple[str | None, dict[str, Any]]:
    """The caption and columns in a picture's file: camera and place by EXIF, and XMP,
    or IPTC where that is silent.
    """
    image: Any = encoded.image
    exif: Any = encoded.exif
    columns: dict[str, Any] = {}
    with contextlib.suppress(
        Exception
    ):  # Pillow raises nearly anything on damaged metadata
        iptc = IptcImagePlugin.getiptcinfo(image) or {}
        for name, key, separator in _IPTC:
            raw = iptc.get(key) or []
            texts = [
                _iptc_text(text or b"")
                for text in (raw if isinstance(raw, list) else [raw])
            ]
            columns |= (
                {name: text} if (text := separator.join(filter(None, texts))) else {}
            )
    with contextlib.suppress(Exception):
        xmp = image.info.get("xmp", b"")
        columns |= of_xmp(xmp.encode() if isinstance(xmp, str) else xmp)
    with contextlib.suppress(Exception):  # as above, or there is none
        make, model = (str(exif.get(tag) or "").strip("\0 ") for tag in (_MAKE, _MODEL))
        columns |= (
            {"camera": text}
            if (text := model if model.startswith(make) else f"{make} {model}".strip())
            else {}
        )
        gps = exif.get_ifd(_GPS)
        for name, reference, below in (("latitude", 1, "S"), ("longitude", 3, "W")):
            degrees, minutes, seconds = map(float, gps[reference + 1])
            sign = -1 if gps[reference] == below else 1
            columns[name] = round(sign * (degrees + minutes / 60 + seconds / 3600), 6)
    return columns.pop("caption", None), columns


def _iptc_text(text: bytes) -> str:
    try:
        return text.decode("utf-8").strip("\0 ")
    except UnicodeDecodeError:  # what Windows wrote before that
        return text.decode("cp1252", "replace").strip("\0 ")


def of_xmp(data: bytes) -> dict[str, Value]:
    """The columns of an XMP packet.

    One with a DTD, which could make gigabytes of a few bytes, is not read.
    """
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if wide else "utf-8-sig", "replace").strip("\0 \r\n\t")
    columns: dict[str, Value] = {}
    with contextlib.suppress(ElementTree.ParseError, ValueError):
        root = None if "<!DOCTYPE" in text or not text else ElementTree.fromstring(text)
        for about in (
            []
            if root is None
            else [item for rdf in root.iter(f"{_RDF}RDF") for item in rdf]
        ):
            for name, column, most in (
                ("subject", "tags", None),
                ("description", "caption", 1),
            ):
                lines = [
                    line
                    for parent in about.findall(f"{_DC}{name}")
                    for line in parent.iter(f"{_RDF}li")
                ]
                lines.sort(key=lambda line: "x-default" not in line.attrib.values())
                texts = [text for line in lines if (text := (line.text or "").strip())]
                columns |= {column: ", ".join(texts[:most])} if texts else {}
            with contextlib.suppress(ValueError):
                rating = float(about.get(_RATING) or about.findtext(_RATING) or "-")
                columns["rating"] = int(rating) if rating.is_integer() else rating
    return columns


def date_of(
    path: str, stated: Value, exif: Exif | None, by_takeout: Value = None
) -> tuple[str | None, Value]:
    """The ISO 8601 date that a column, EXIF, Takeout, a file's name or time states; and
    which of the middle three.
    """
    is_stated = stated not in (None, "")
    if is_stated and (taken := iso_date(stated)):
        return taken, None
    with contextlib.suppress(Exception):  # as above
        for raw in (
            []
            if exif is None
            else [exif.get_ifd(_EXIF).get(_TAKEN), exif.get(_CHANGED)]
        ):
            if (taken := iso_date(str(raw))) and int(
                taken[:4]
            ) <= date.today().year + 1:  # a camera without a clock
                return taken, "exif"
    if is_stated:
        return None, None
    if by_takeout:
        return str(by_takeout), "takeout"
    for match in _NAMED.finditer(re.split(r"/|\\|::", path)[-1]):
        year, _, month, day, *time = match.groups()
        if taken := iso_date(f"{year}-{month}-{day}"):
            return f"{taken}T{':'.join(time)}" if time[0] else taken, "name"
    with contextlib.suppress(
        OSError, ValueError, OverflowError
    ):  # a member of a container has none
        return (
            datetime.fromtimestamp(os.stat(path).st_mtime).isoformat(  # noqa: PTH116
                timespec="seconds"
            ),
            None,
        )
    return None, None


def iso_date(stated: Value) -> str | None:
    """ISO 8601 of a date that begins with the year: ``2024``, ``20240601``, ``2024/6/1
    10:00``.
    """
    text = str(
        int(stated) if isinstance(stated, float) and stated.is_integer() else stated
    ).strip("\0 ")
    if match := _DATE.fullmatch(text):
        year, *parts = [int(part) for part in match.groups()[:6] if part]
        with contextlib.suppress(ValueError):
            date(year, *[*parts, 1, 1][:2])
            day = "-".join([f"{year:04}", *(f"{part:02}" for part in parts)])
            return f"{day}T{match[7]}" if match[7] else day
    return None
