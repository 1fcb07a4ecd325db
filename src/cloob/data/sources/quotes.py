"""Rows of a text table that a stray quote takes into one field.

A quote at the start of a field opens it, and it goes on, over any number of lines, to the next quote or to the end of
the file. That is how a caption may have several lines, and how one quote too many hides rows without an error.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from cloob.data.source import IMAGE_EXTENSIONS

_CHUNK = 16 * 1024 * 1024
_LOOKED_AT = 1024 * 1024  # bytes of a field in which lines are compared with rows
_MANY = 20  # lines with as many fields as the table has columns

_LINE_END = re.compile(rb"\r\n|\n|\r")
_EMPTY_LINE = re.compile(rb"(?>\r\n|\n|\r)(?=[\r\n])")
# A cell that is a picture's path; with blanks in it, it may as well be prose.
_PICTURE = re.compile(rf"\S+\.(?:{'|'.join(IMAGE_EXTENSIONS)})\"?".encode(), re.IGNORECASE)


@dataclass(frozen=True)
class Swallowed:
    """A quoted field that runs over rows.

    Attributes:
        row: The row of the table that has the field, from 0.
        line: The line of the file in which the quote opens, from 1.
        rows: Rows after it that the field has taken in.
        to_end: Whether the quote is never closed.
    """

    row: int
    line: int
    rows: int
    to_end: bool

    def __str__(self) -> str:
        until = " to the end of the file" if self.to_end else ""
        rows = f"the {self.rows:,} rows after it" if self.rows > 1 else "the row after it"
        return f"the quote that opens in line {self.line:,} takes in {rows}{until}"


def has_long_fields(path: Path, rows: int) -> bool:
    """Whether a text table has more lines than rows and a header, and a quote: then some field may run over lines."""
    lines, quote, last = 0, False, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            lines += _line_ends(chunk) - (last == b"\r" and chunk[:1] == b"\n")
            quote = quote or b'"' in chunk
            last = chunk[-1:]
    return quote and lines + (last not in b"\r\n") != rows + 1


def find_swallowed(path: Path, delimiter: str, columns: list[str], image_column: str) -> tuple[int, list[Swallowed]]:
    """Looks through all quoted fields that run over lines for those that hold rows.

    A field holds rows when its quote is never closed, when something other than a delimiter follows the closing quote,
    when at least half of its lines have the table's number of fields and a picture's path among them, or when that
    number is right in nearly all of many lines. Other lines are a caption's own.

    Args:
        path: The table.
        delimiter: One character.
        columns: The names in the header.
        image_column: The one of the pictures.

    Returns:
        The number of rows as a CSV reader counts them, and the fields in order.
    """
    comma = delimiter.encode()
    quoted = _long_field(comma)
    place = columns.index(image_column)
    swallowed: list[Swallowed] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _LINE_END.search(data)
        at = header.end() if header else len(data)
        line, row, fresh = 2, 0, True  # of the byte `at`
        while match := quoted.match(data, at):
            start, end = match.span("field")
            lines, rows = _count(data, at, start, fresh)
            line, row = line + lines, row + rows
            lines, inside = _count(data, start, end, False)
            closed = bool(match["close"])
            if not closed and data[end - 1] in b"\r\n":  # the last row's own line end
                inside -= 1
            text = data[start : min(end, start + _LOOKED_AT)]
            stray = not closed or _goes_on(data, end, comma) or _holds_rows(text, comma, len(columns), place)
            if inside and stray:
                swallowed.append(Swallowed(row, line, inside, not closed))
            line, at, fresh = line + lines, end, False
        _, rows = _count(data, at, len(data), fresh)
        unfinished = len(data) > at and data[len(data) - 1] not in b"\r\n"
        ended = at == len(data) and not fresh  # in a field, with or without a line end of its own
        return row + rows + (unfinished or ended), swallowed


def _long_field(comma: bytes) -> re.Pattern[bytes]:
    """Everything up to the next quoted field that runs over lines or to the end of the file, and that field.

    Without backtracking, and to be matched at a place: where no such field is left, a search would begin anew at each
    byte.
    """
    ends = rb"\r\n" + re.escape(comma)
    inside = rb'(?<![%s])"' % ends
    of_one_line = rb'"[^"\r\n]*+(?:""[^"\r\n]*+)*+"(?!")'
    field = rb'"[^"]*+(?:""[^"]*+)*+(?P<close>"?)'
    return re.compile(rb'(?:[^"]++|%s|%s)*+(?P<field>%s)' % (inside, of_one_line, field))


def _goes_on(data: mmap.mmap, end: int, comma: bytes) -> bool:
    """Whether something follows a closing quote before the field ends."""
    after = data[end : end + 64].lstrip(b" ") if comma != b" " else data[end : end + 1]
    return bool(after) and after[:1] not in (comma, b"\r", b"\n")


def _holds_rows(text: bytes, comma: bytes, columns: int, place: int) -> bool:
    """Whether the lines of a field, after its first, look like rows of the table."""
    lines = [line.split(comma) for line in _LINE_END.split(text)[1:] if line.strip()]
    fitting = [fields for fields in lines if len(fields) == columns]
    named = sum(_PICTURE.fullmatch(fields[place]) is not None for fields in fitting)
    return (named > 0 and 2 * named >= len(lines)) or (len(fitting) >= _MANY and len(fitting) >= 0.9 * len(lines))


def _count(data: mmap.mmap, start: int, end: int, fresh: bool) -> tuple[int, int]:
    """Line ends in a range, and those of them that end a line which is not empty; ``fresh``: a line begins there."""
    lines = empty = 0
    while start < end:
        stop = end
        if start + _CHUNK < end:  # cut after a line
            cut = max(data.rfind(b"\n", start, start + _CHUNK), data.rfind(b"\r", start, start + _CHUNK - 1))
            stop = cut + 1 if cut >= 0 else start + _CHUNK
            stop += data[stop - 1 : stop + 1] == b"\r\n"
        chunk = data[start:stop]
        lines += _line_ends(chunk)
        if fresh and chunk[:1] in (b"\r", b"\n"):
            empty += 1
        if b"\n\n" in chunk or b"\n\r" in chunk or b"\r\r" in chunk:
            empty += len(_EMPTY_LINE.findall(chunk))
        fresh = chunk[-1:] in (b"\r", b"\n")
        start = stop
    return lines, lines - empty


def _line_ends(chunk: bytes) -> int:
    lines = chunk.count(b"\n")
    return lines + chunk.count(b"\r") - chunk.count(b"\r\n") if b"\r" in chunk else lines
