"""A contact sheet of a set of pairs: pictures, captions, and what was seen of all of them, in one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cloob.data.batch import BadSample
from cloob.data.source import Source
from cloob.data.survey import Survey
from cloob.evaluation.report.pictures import data_uri
from cloob.evaluation.report.template import render
from cloob.files import write_whole


def write_sheet(
    path: Path, source: Source, survey: Survey, facts: Sequence[tuple[str, str]], pictures: int = 60
) -> None:
    """Writes the sheet.

    Args:
        path: The file to write; its folder is created. It appears complete or not at all.
        source: The pairs.
        survey: What was seen of them.
        facts: Names and sentences of the table at the top.
        pictures: Pictures on the sheet, spread evenly over the usable pairs.

    Raises:
        InputError: ``path`` cannot be written.
    """
    rows = survey.usable
    count = min(pictures, len(rows))
    shown = [rows[i * (len(rows) - 1) // max(1, count - 1)] for i in range(count)]
    page = render(
        "sheet.html.j2",
        title=survey.name,
        facts=facts,
        pairs=list(_pairs(source, shown)),
        bad=[(reason, count, examples) for reason, (count, examples) in sorted(survey.bad.items())],
        pictures=[(repeat.count, pair) for repeat in survey.pictures.most() for pair in _pairs(source, [repeat.row])],
        captions=survey.captions.most(),
    )
    write_whole(path, page, f"{path}: the contact sheet cannot be written here")


def _pairs(source: Source, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    for row in rows:
        try:
            sample = source.read(row)
        except BadSample:  # it was there when it was looked at
            continue
        yield {"uri": data_uri(sample.image), "caption": sample.caption, "key": sample.key}
