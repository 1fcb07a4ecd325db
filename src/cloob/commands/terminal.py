"""What commands show: the next command, progress, tables."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LINE_SECONDS = 60.0


def say(text: str) -> None:
    """Prints a line on stderr, at once, as what follows may take minutes."""
    print(f"cloob: {text}", file=sys.stderr, flush=True)


def say_next(*commands: Sequence[str | Path]) -> None:
    """Prints commands to copy, quoted for a shell, on stderr."""
    for i, words in enumerate(commands):
        print(f"{'next:' if i == 0 else '  or:'} {shell(words)}", file=sys.stderr)


def shell(words: Sequence[str | Path]) -> str:
    return shlex.join(["cloob", *map(str, words)])


class Progress:
    """How far the work is, on stderr: bars on a terminal, else a line each minute."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, Any] = {}
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def update(self, what: str, done: int, total: int) -> None:
        from rich.markup import escape

        if sys.stderr.isatty():
            self._bars.start()
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(escape(what), total=total)
            self._bars.update(self._tasks[what], completed=done, total=total, visible=done < total)
        elif done < total and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            say(f"{what}: {done:,} of {total:,}")
