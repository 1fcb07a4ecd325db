"""What commands show: the next command, progress, tables."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows how far the work is, on stderr: bars on a terminal, else a line each minute."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    to_person, tasks, last = sys.stderr.isatty(), dict[str, Any](), time.monotonic()

    def update(what: str, done: int, total: int) -> None:
        nonlocal last
        if to_person:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=total)
            bars.update(tasks[what], completed=done, total=total, visible=done < total)
        elif done < total and time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done:,} of {total:,}")

    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not to_person) as bars:
        yield update
