"""What commands show: the next command, progress, tables."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_LINE_SECONDS = 60.0


def say(text: str) -> None:
    """A line of ours on stderr, as a program may read the output; at once, as what follows may take minutes."""
    print(f"cloob: {text}", file=sys.stderr, flush=True)


def say_next(*commands: Sequence[str | Path]) -> None:
    """Prints commands to copy, quoted for a shell, on stderr."""
    for i, words in enumerate(commands):
        print(f"{'next:' if i == 0 else '  or:'} {shell(words)}", file=sys.stderr)


def shell(words: Sequence[str | Path]) -> str:
    return shlex.join(["cloob", *map(str, words)])


class Progress:
    """How far the work is, on stderr: bars on a terminal, else a line each minute and, if asked for, at each tenth."""

    def __init__(self, *, tenths: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, Any] = {}
        self._tenths: dict[str, int] | None = {} if tenths else None
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Says that of ``what`` so many of so many are done."""
        from rich.markup import escape

        if sys.stderr.isatty():
            self._bars.start()
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(escape(what), total=total)
            self._bars.update(self._tasks[what], completed=done, total=total, visible=done < total)
            return
        late = time.monotonic() - self._last >= _LINE_SECONDS
        if self._tenths is not None and (tenth := done * 10 // max(total, 1)) > self._tenths.get(what, 0):
            self._tenths[what], late = tenth, True
        if late and done < total:
            self._last = time.monotonic()
            say(f"{what}: {done:,} of {total:,}")


def print_table(header: Sequence[str], sections: Iterable[Sequence[Sequence[str]]], title: str | None = None) -> None:
    """Prints a table: a label and a number per column in each row, a rule between sections."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=None if title is None else escape(title), title_justify="left", pad_edge=False)
    table.add_column("")
    for name in header:
        table.add_column(escape(name), justify="right")
    for rows in sections:
        table.add_section()
        for row in rows:
            table.add_row(*map(escape, row))
    if table.row_count:
        Console().print(table)
