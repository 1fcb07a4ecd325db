"""Makes an index or brings one up to date, as ``cloob index`` was asked to, and says what came of it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cloob.commands.indexing import IndexArguments
from cloob.commands.search import INDEX_FILE
from cloob.commands.steps import say_next, shell
from cloob.commands.work.collection import say_left_out
from cloob.distributed import rank
from cloob.errors import InputError, message, printable, require
from cloob.search.build import Summary
from cloob.search.export import is_export
from cloob.search.index import Index
from cloob.search.open import is_database, is_there
from cloob.search.scan.collection import EXAMPLES
from cloob.search.scan.open import ScanOptions
from cloob.search.sqlite.file import not_writable
from cloob.search.update import ModelChanged, UpdateOptions

_SAID_EVERY = 60.0


def run(arguments: IndexArguments) -> int:
    """Indexes, merges, exports; returns the exit code."""
    if arguments.export is not None and arguments.export.exists() and not is_export(arguments.export):
        raise InputError(f"--export {arguments.export}: is a file of another kind; name another file")
    if arguments.faults:
        with Index.open(arguments.out) as index:
            states = (state for source in index.store.sources() for state in index.store.states(source))
            for state in states:
                if state.fault is not None:
                    print(f"{printable(state.path)}: {printable(state.fault)}")
        return 0
    new = not is_there(arguments.out)
    with _open(arguments) as index, _alone(index.store.address):
        try:
            return _work(index, arguments)
        except Exception:
            if new and not index.models:
                index.close()
                _remove(Path(arguments.out))
            raise


def _work(index: Index, arguments: IndexArguments) -> int:
    failed = False
    if arguments.sources or not (arguments.merge or arguments.export):
        try:
            summary = _update(index, arguments)
        except KeyboardInterrupt:
            print(
                f"cloob: interrupted; {len(index):,} pictures are in {index.store.address}, the same command goes on",
                file=sys.stderr,
            )
            return 130
        failed = _tell(summary, index.store.address) if _is_first() else False
    if arguments.merge is not None:
        with Index.open(arguments.merge) as other:
            done = index.merge(other)
        print(f"{arguments.merge}: {done.added:,} pictures added, {done.vectors:,} vectors, {done.present:,} known")
        if done.other:
            print(f"cloob: {done.other:,} pictures are other ones here; they stay as they are", file=sys.stderr)
    if arguments.export is not None:
        rows = index.export(arguments.export, model=arguments.name)
        print(f"{arguments.export}: {rows:,} rows")
    if _is_first():
        _next(index, index.store.address, failed)
    return 1 if failed else 0


@contextlib.contextmanager
def _alone(address: str) -> Iterator[None]:
    """Holds the folder of an index against other processes; the system lets go of it when this one ends."""
    if is_database(address) or not _is_first():
        yield
        return
    library = require("filelock", "train")
    lock = library.FileLock(Path(address) / f"{INDEX_FILE}.lock", timeout=0)
    try:
        lock.acquire()
    except library.Timeout:
        raise InputError(f"another `cloob index` is at work on {address}; wait until it is done") from None
    except OSError:
        raise not_writable(Path(address)) from None
    with lock:
        yield


def _remove(folder: Path) -> None:
    """Removes an index that nothing came into."""
    for path in folder.glob(f"{INDEX_FILE}*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other files are in it
        folder.rmdir()


def _open(arguments: IndexArguments) -> Index:
    """The index, made where it is missing; of several ranks the first one makes it."""
    if is_database(arguments.out):
        return Index.create(arguments.out)
    if is_there(arguments.out):
        return Index.open(arguments.out, writable=True)
    try:
        return Index.create(arguments.out)
    except InputError:
        if not is_there(arguments.out):  # else another rank was faster
            raise
        return Index.open(arguments.out, writable=True)


def _update(index: Index, arguments: IndexArguments) -> Summary:
    options = UpdateOptions(
        model=arguments.model,
        name=arguments.name,
        replace_model=arguments.replace_model,
        device=arguments.device,
        precision=arguments.precision,
        draft=arguments.draft or None,
        scan=ScanOptions(arguments.exclude, arguments.image_column, arguments.caption_column),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        max_megapixels=arguments.max_megapixels,
        remove_all=arguments.remove_all,
    )
    with _Bar() as bar:
        try:
            return index.update(arguments.sources, options, progress=bar.update)
        except ModelChanged as error:
            if not _agrees(error):
                raise
        return index.update(arguments.sources, replace(options, replace_model=True), progress=bar.update)


def _agrees(error: ModelChanged) -> bool:
    """Asks whether a model's vectors may go; without a terminal nobody says so."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"cloob: {message(error)}", file=sys.stderr)
    print("Make its vectors anew? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class _Bar:
    """How far it is and how long it takes: a bar, or without a terminal a line a minute."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("pictures", total=None)
        self._start = self._said = time.monotonic()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """So many of so many."""
        if not _is_first():
            return
        if sys.stderr.isatty():
            if not self._bar.live.is_started:
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self._said >= _SAID_EVERY:
            self._said = now
            rate = done / (now - self._start)
            left = (total - done) / rate / 60
            said = f"{done:,} of {total:,} pictures, {rate:,.0f} a second, {left:,.0f} minutes left"
            print(f"cloob: {said}", file=sys.stderr, flush=True)


def _is_first() -> bool:
    """Whether this is the rank that speaks."""
    return rank() == 0 and os.environ.get("RANK", "0") == "0"


def _tell(summary: Summary, address: str) -> bool:
    """Says what was done, and on stderr what was not; whether a source could not be read, or nothing of it."""
    counts = (
        ("added", summary.added),
        ("changed", summary.changed),
        ("with a new date, size or caption", summary.described),
        ("known, with a vector of this model now", summary.completed),
        ("removed", summary.removed),
        ("as they were", summary.unchanged),
    )
    said = ", ".join(f"{count:,} {what}" for what, count in counts if count) or "none"
    speed = f" ({summary.embedded / summary.seconds:,.0f} a second)" if summary.embedded > 1 else ""
    print(f"pictures: {said}; {summary.embedded:,} embedded in {summary.seconds:,.1f} s{speed}")
    say_left_out(summary)
    if any(count > EXAMPLES for count in summary.faults.values()):
        print(f"cloob: all of them: {shell(['index', '--out', address, '--faults'])}", file=sys.stderr)
    for source, why in summary.refused.items():
        print(f"cloob: {printable(source)}: {printable(why)}", file=sys.stderr)
    nothing = not any(count for _, count in counts)
    return bool(summary.refused or summary.unread or nothing)


def _next(index: Index, address: str, failed: bool) -> None:
    """What is there, and the commands that come next."""
    models = "".join(f", {printable(model.name)}" for model in index.models)
    print(f"{address}: {len(index):,} pictures{models}", flush=True)
    if len(index) and models and not failed:
        say_next(["search", address, "something red"], ["serve", address, "--open"])
