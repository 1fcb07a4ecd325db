"""What a part writes: a line of JSON for each row, at once, so that a part that is ended keeps what it had."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Record:
    """The rows of one part, and the time that is left to it.

    Args:
        path: Where rows go.
        seconds: Time of the part.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the part has to be over."""
        return self._end - time.monotonic()

    def row(self, **values: Any) -> None:
        """Writes down a row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def skip(self, what: str, why: str) -> None:
        """Writes down what was left out."""
        self.row(skipped=what, why=why)

    def has_time_for(self, what: str, seconds: float, share: float = 0.5) -> bool:
        """Whether something may take this long: a share of what is left; else it is named as left out."""
        left = self.left()
        if seconds <= share * left:
            return True
        self.skip(what, f"would take about {seconds:.1f} s, {max(left, 0.0):.0f} s are left to this part")
        return False


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a part's file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line that was being written when the part was ended
            break
    return rows
