"""``cloob index``: index a collection of pictures, or bring an index up to date."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cloob
from cloob.commands.console import check_there, progress, say, say_next, threads
from cloob.commands.options import Batch, Device, Threads
from cloob.errors import InputError, counted, printable
from cloob.models.source import check_source

if TYPE_CHECKING:
    from cloob.models.encoder import DualEncoder
    from cloob.search.plan import Summary
    from cloob.search.update import UpdateOptions

INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """Index pictures, or bring an index up to date: new, changed and removed files."""

    sources: Annotated[tuple[str, ...], "SRC …"] = ()
    """Folders of pictures, pictures, or tables of them; none: all that the index knows.
    """
    out: Annotated[str, "DIR"] = ""
    """The folder of the index, made where it is missing."""
    model: str | None = None
    """Run or model folder, NAME/TAG of open_clip, hf-hub:…; left out, the index's own.
    """
    remove_all: bool = False
    """Remove all pictures of a source of which nothing is there any more."""
    prune: bool = False
    """Then forget vectors of pictures that no path has named for 30 days."""
    anew: bool = False
    """Delete the index first, of whatever format or however damaged it is."""
    faults: bool = False
    """List the files that could not be read, and why; index nothing."""
    image_column: str | None = None
    """Column of a table with the picture or its path."""
    caption_column: str | None = None
    """Column of a table with the caption."""
    batch_size: Batch = 64
    """Pictures a forward pass, and a transaction."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: Threads = None
    """Decoding threads; left out, one per processor."""


def run(options: Options) -> int:
    """Indexes; 1 when a source could not be read, with
    the rest written.
    """
    from cloob.search.database import is_there

    check_options(options)
    if not is_there(options.out):
        check_new(options)
    if options.faults:
        return print_faults(options)
    if options.anew:
        remove_old(options)
    if is_there(options.out):
        with cloob.Index.open(options.out, writable=True) as index:
            return bring_up_to_date(index, options)
    with new_index(Path(options.out)) as index:
        return bring_up_to_date(index, options)


@contextlib.contextmanager
def new_index(folder: Path) -> Iterator[cloob.Index]:
    """A new index; nothing is left of it if it fails before a picture is in it."""
    from cloob.search import database

    was_there = folder.is_dir()
    with cloob.Index.create(folder) as index:
        try:
            yield index
        except Exception:
            if not len(index):
                index.close()
                database.remove(folder)
                database.lock_file(folder).unlink(missing_ok=True)
                if not was_there:
                    with contextlib.suppress(OSError):  # others may have come into it
                        folder.rmdir()
            raise


def check_options(options: Options) -> None:
    """Refuses options that lack another, or are out of range."""
    if not options.out:
        raise InputError("--out is missing; it names the index (cloob index --help)")
    if options.anew and not (options.sources and options.model):
        raise InputError("--anew needs SRC and --model")
    if options.faults and options != Options(out=options.out, faults=True):
        raise InputError("--faults lists what an index knows; give --out alone with it")
    if options.model is not None:
        check_source(options.model)


def check_new(options: Options) -> None:
    """Refuses a place where no new index can be made. An index that is there may know a
    source that is gone.
    """
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out is the folder of the index")
    if folder.is_dir() and any(
        not entry.name.startswith(".tmp-") for entry in folder.iterdir()
    ):
        raise InputError(
            f"{folder}: is a folder with other files in it; --out names a new one, or"
            " an index"
        )
    if not options.sources:
        raise InputError(
            f"{folder}: no index; name what is to be indexed: cloob index SRC --model M"
            f" --out {folder}"
        )
    if options.model is None:
        raise InputError(
            "--model is missing; a new index needs one, such as a run folder or"
            " RN50/openai"
        )
    for source in options.sources:
        check_there(source)


def print_faults(options: Options) -> int:
    """Prints the files of an index that could not be read, and why."""
    with cloob.Index.open(options.out) as index:
        for source in index.store.sources():
            for state in index.store.states(source):
                if state.fault is not None:
                    print(f"{printable(state.path)}: {printable(state.fault)}")
    return 0


def remove_old(options: Options) -> None:
    """Deletes the index, once it is known that it can be made again."""
    from cloob.models.load import load_model
    from cloob.search.database import remove

    for source in options.sources:
        check_there(source)
    load_model(str(options.model))
    remove(Path(options.out))


def bring_up_to_date(index: cloob.Index, options: Options) -> int:
    """Updates an index, and prints what was done and left out; the exit code."""
    address = index.store.address
    try:
        summary = index.update(
            options.sources,
            update_options(options),
            progress=functools.partial(progress(), "pictures"),
        )
    except KeyboardInterrupt:
        say(
            f"interrupted; {len(index):,} pictures are in {address}, the same command"
            " goes on"
        )
        return INTERRUPTED
    advice = f"; cloob index --out {address} --faults lists those not read"
    report_left_out(summary, advice if summary.faults else "")
    for source, why in summary.refused.items():
        say(f"{printable(source)}: {printable(why)}")
    if options.prune:
        say(f"forgotten: {counted(index.store.prune(), 'contents')} that no path names")
    line = summary_line(summary)
    print(f"{describe(index)}; {line}")
    failed = bool(summary.refused or summary.unread or line.startswith("none"))
    if len(index) and not failed:
        say_next(["search", address, "something red"])
    return 1 if failed else 0


def describe(index: cloob.Index) -> str:
    """An index in a line."""
    model = index.store.stored_model()
    name = f", {printable(model.name)}" if model else ""
    return f"{index.store.address}: {len(index):,} pictures{name}"


def update_options(options: Options) -> UpdateOptions:
    from cloob.search.update import UpdateOptions

    return UpdateOptions(
        model=options.model,
        device=options.device,
        image_column=options.image_column,
        caption_column=options.caption_column,
        batch_size=options.batch_size,
        workers=threads(options.workers),
        remove_all=options.remove_all,
    )


def summary_line(summary: Summary) -> str:
    """One line of what an update did, in numbers."""
    counts = {
        "added": summary.added,
        "changed": summary.changed,
        "with a new date, size or caption": summary.described,
        "removed": summary.removed,
        "as they were": summary.unchanged,
    }
    done = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    speed = f"{summary.embedded:,} embedded in {summary.seconds:,.1f} s"
    lost = {
        "not read": summary.faults.total(),
        "left out": summary.left_out.counts.total(),
    }
    numbers = [f"{count:,} {what}" for what, count in lost.items() if count]
    return "; ".join([done or "none", speed, *numbers])


def check_index(typed: str) -> str:
    """The folder of the index that is meant; refuses a place without one."""
    from cloob.search.address import find_index
    from cloob.search.database import is_there

    address = find_index(typed)
    if is_there(address):
        return address
    if not Path(address).exists():
        raise InputError(f"{address}: no such folder")
    if Path(address).is_file():
        raise InputError(f"{address}: is a file; name the folder of an index")
    raise InputError(
        f"{address}: holds no index; cloob find {address} 'a red bird' makes one and"
        f" searches it, cloob index {address} --model M --out NAME.idx makes one"
    )


@contextlib.contextmanager
def opened(
    source: str,
    model: str | DualEncoder | None,
    device: str,
    workers: int | None,
) -> Iterator[tuple[cloob.Index, int]]:
    """An index of a source, and how many of its pictures, folders and shards could not
    be read; some are named.

    Pictures are embedded into an index that is gone at the end, by what ``load_model``
    takes, or a loaded model.
    """
    from cloob.search.database import is_there

    if is_there(source):
        if workers is not None:
            raise InputError("--workers is for pictures; an index has their vectors")
        if model is not None:
            raise InputError(f"{source}: has a model; --model is for pictures")
        with cloob.Index.open(source) as index:
            yield index, 0
        return
    if "://" not in source:
        check_there(source)
    if model is None:
        raise InputError(
            "no model given: --model names a run folder, or NAME/TAG of open_clip"
        )
    if isinstance(model, str):
        check_source(model)
    from cloob.search.update import UpdateOptions  # torch

    options = UpdateOptions(model, device=device, workers=threads(workers))
    with (
        tempfile.TemporaryDirectory(prefix="cloob-") as folder,
        cloob.Index.create(Path(folder) / "index") as index,
    ):
        update = functools.partial(progress(), "pictures")
        summary = index.update([source], options, progress=update)
        for place, why in summary.refused.items():
            raise InputError(f"{printable(place)}: {why}")
        report_left_out(summary)
        yield index, summary.faults.total() + summary.unread


def report_left_out(summary: Summary, ending: str = "") -> None:
    """Names on one line what of the sources is left out, and why."""
    reasons = []
    for kind in (summary.unreadable, summary.left_out):
        for reason, count in kind.counts.most_common():
            example, *further_examples = map(printable, kind.examples[reason])
            reasons.append(
                f"{count:,} × {reason}: {example}{', …' if further_examples else ''}"
            )
    if reasons:
        say(f"left out: {'; '.join(reasons)}{ending}")
