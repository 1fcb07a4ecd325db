"""What commands share: checks of what was typed, and what they print."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.data.shards.spec import is_pattern, is_remote
from cloob.errors import InputError, counted
from cloob.machine import decoders

if TYPE_CHECKING:
    from cloob.heads.run import HeadsResult
    from cloob.training.callbacks import RunResult

PROGRESS_SECONDS = 10.0
_hints = True


@contextlib.contextmanager
def no_hints() -> Iterator[None]:
    """Inside, commands do not say what may come next."""
    global _hints
    _hints = False
    try:
        yield
    finally:
        _hints = True


def threads(workers: int | None) -> int:
    """Decoding threads: those that were asked for, or one a processor."""
    return decoders() if workers is None else workers


def check_there(source: str) -> None:
    """Raises InputError for a file or folder that is not there; addresses, patterns and
    the demo are looked at later.
    """
    if is_remote(source) or is_pattern(source) or source.partition(":")[0] == "demo":
        return
    if not Path(source).expanduser().exists():
        raise InputError(f"{source}: no such file or folder")


def check_out(
    option: str,
    path: Path,
    endings: Sequence[str],
    inputs: Iterable[str | None] = (),
    *,
    overwrite: bool = True,
) -> None:
    """Raises InputError for a file that cannot be written, is one of the inputs, or is
    there and not to be replaced.
    """
    expected = f"it must be a file {' or '.join(endings)}"
    if path.suffix not in endings:
        ending = path.suffix or "nothing"
        raise InputError(f"{option} {path}: ends in {ending}; {expected}")
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; {expected}")
    for spec in filter(None, inputs):
        file_of_column = spec.rpartition(":")[0]  # of FILE:COLUMN
        files = map(os.path.realpath, (spec, file_of_column))
        if os.path.realpath(path) in files:
            raise InputError(f"{option} {path}: is what is read; name another file")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; --overwrite replaces it")
    check_folder(path.parent, f"{path}: cannot be written")


def check_folder(folder: Path, refused: str) -> None:
    """Raises InputError for a folder in which nothing can be written, before the work
    whose result goes there; ``refused`` is what it says before the reason.

    A folder that is not there is not made, as it would outlive an error.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise InputError(f"{refused} ({place} is no folder)")
    if not os.access(place, os.W_OK):
        raise InputError(f"{refused} (no permission for {place})")


def say(text: str) -> None:
    """Prints a line on stderr, at once, as what follows may take minutes."""
    print(f"cloob: {text}", file=sys.stderr, flush=True)


def say_next(*commands: Sequence[str | Path]) -> None:
    """Says what may come next, unless another command runs this one."""
    if not _hints:
        return
    for i, words in enumerate(commands):
        title = "next:" if i == 0 else "  or:"
        print(title, shlex.join(["cloob", *map(str, words)]), file=sys.stderr)


def say_next_of_pictures(out: Path, source: str, holds_out: bool) -> None:
    """Says what may follow a training on pictures and captions."""
    judge = ["--held-out"] if holds_out else ["--retrieval", "PAIRS"]
    pictures = source if Path(source).is_dir() else "PICTURES"
    index = ["index", pictures, "--model", str(out), "--out", "pictures.idx"]
    say_next(["eval", out, *judge], index, ["search", "pictures.idx", "a red bird"])


def print_length(result: RunResult | HeadsResult, patience: int) -> None:
    """Says how long a run was, and why it ended."""
    epochs = counted(result.epochs, "epochs")
    steps = counted(result.steps, "steps")
    if result.already_finished:
        why = "a longer one goes on"
        if result.out_of_patience:
            why = "the patience was used up, --patience 0 goes on"
        print(f"{result.run}: already finished ({epochs}, {steps}); {why}")
        return
    pairs = f"{result.samples_seen:,} pairs"
    print(f"{result.run}: {steps}, {epochs}, {pairs}, {result.seconds:,.0f} s")
    if result.out_of_patience:
        why = f"no better for {counted(patience, 'epochs')}"
        print(f"stopped at epoch {result.epochs}: {why}")


def print_table(lines: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Prints titles and, to the right of them, columns of numbers."""
    width = max(len(title) for title, _ in lines)
    columns = zip(*(cells for _, cells in lines), strict=True)
    widths = [max(map(len, column)) for column in columns]
    for title, cells in lines:
        numbers = [f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True)]
        print("  ".join([f"{title:<{width}}", *numbers]))


def progress() -> Callable[[str, int, int], None]:
    """What says on stderr how far the work is, every ten seconds at most."""
    last = time.monotonic()

    def update(what: str, done: int, total: int) -> None:
        nonlocal last
        if done < total and time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done:,} of {total:,}")

    return update
