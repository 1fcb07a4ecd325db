"""What other programs wrote of a picture: XMP and IPTC in its file, ``.xmp`` beside it, Google Takeout's ``.json``.

The columns are ``tags`` (dc:subject, separated by ", "), ``rating`` (xmp:Rating) and ``caption`` (dc:description); of
Takeout the date, ``latitude``, ``longitude`` and ``caption``.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from xml.etree import ElementTree

from cloob.files import TooLarge, read_at_most
from cloob.pictures import Encoded
from cloob.search.records import Value

MOST_BYTES = 8 * 1024 * 1024
TAKEOUT = r"(?:\.supp[\w-]*)?\.json"  # of a.jpg it is a.jpg.json, or a.jpg.supplemental-metadata.json, perhaps cut
TAKEN = "date of Takeout"
_BESIDE = re.compile(rf"(?:\.xmp|{TAKEOUT})$", re.IGNORECASE)
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_RATING = "{http://ns.adobe.com/xap/1.0/}Rating"
_KEYWORDS, _CAPTION = (2, 25), (2, 120)  # of IPTC


def files_beside(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of a folder that say something of a picture, by its name or stem: of a.xmp by ``a``."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _BESIDE.search(name):
            found.setdefault(name[: match.start()], []).append(name)
    return found


def read_beside(paths: Iterable[str]) -> dict[str, Value]:
    """What files beside a picture say; nothing of one that cannot be read or is something else."""
    found: dict[str, Value] = {}
    for path in paths:
        with contextlib.suppress(OSError, TooLarge):
            data = read_at_most(path, MOST_BYTES)
            found |= of_xmp(data) if path.lower().endswith(".xmp") else _of_takeout(data)
    return found


def of_file(encoded: Encoded) -> dict[str, Value]:
    """What a picture's file says: its XMP, and IPTC where that is silent."""
    iptc = encoded.iptc
    by_iptc = {"tags": ", ".join(_texts(iptc.get(_KEYWORDS))), "caption": " ".join(_texts(iptc.get(_CAPTION)))}
    return {name: text for name, text in by_iptc.items() if text} | of_xmp(encoded.xmp)


def of_xmp(data: bytes) -> dict[str, Value]:
    """The columns of an XMP packet. One with a DTD, which could make gigabytes of a few bytes, is not read."""
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if wide else "utf-8-sig", "replace").strip("\0 \r\n\t")
    try:
        root = None if "<!DOCTYPE" in text or not text else ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError):
        root = None
    found: dict[str, Value] = {}
    for about in [] if root is None else [each for rdf in root.iter(f"{_RDF}RDF") for each in rdf]:
        if tags := _items(about.find(f"{_DC}subject")):
            found["tags"] = ", ".join(tags)
        if caption := _items(about.find(f"{_DC}description")):
            found["caption"] = caption[0]
        with contextlib.suppress(ValueError):
            rating = float(about.get(_RATING) or about.findtext(_RATING) or "-")
            found["rating"] = int(rating) if rating.is_integer() else rating
    return found


def _items(element: ElementTree.Element | None) -> list[str]:
    """The texts of a list of RDF, of alternatives that for any language first."""
    lines = [] if element is None else list(element.iter(f"{_RDF}li"))
    lines.sort(key=lambda line: "x-default" not in line.attrib.values())
    return [text for line in lines if (text := (line.text or "").strip())]


def _of_takeout(data: bytes) -> dict[str, Value]:
    """The columns of a file of Google Takeout; its times are in UTC, ours here."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError):
        raw: dict[str, Any] = json.loads(data)
        taken = datetime.fromtimestamp(int(raw["photoTakenTime"]["timestamp"])).isoformat(timespec="seconds")
        found: dict[str, Value] = {TAKEN: taken}
        place = {name: float(raw.get("geoData", {}).get(name, 0)) for name in ("latitude", "longitude")}
        found |= place if any(place.values()) else {}
        return found | ({"caption": caption} if (caption := str(raw.get("description") or "").strip()) else {})
    return {}


def _texts(raw: Any) -> list[str]:
    """IPTC's bytes as text: UTF-8, or what Windows wrote before that."""
    texts = []
    for each in raw if isinstance(raw, list) else [raw]:
        with contextlib.suppress(UnicodeDecodeError, AttributeError):
            texts.append(each.decode("utf-8"))
            continue
        if isinstance(each, bytes):
            texts.append(each.decode("cp1252", "replace"))
    return [text for text in (text.strip("\0 ") for text in texts) if text]
