"""``cloob index``: makes an index of pictures, or brings one up to date."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cloob.commands.collection import INDEX_FILE, report_left_out
from cloob.commands.options import CacheOptions, check_there, tyro
from cloob.commands.terminal import Progress, say_next, shell
from cloob.errors import InputError, printable, require

if TYPE_CHECKING:
    from cloob.search.build import Summary
    from cloob.search.index import Index


@dataclass(frozen=True)
class Options:
    """Index pictures, or bring an index up to date: new, changed and removed files."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SRC …")] = ()
    """Folders of pictures, or what `cloob train --data` reads (captions are not needed); none: all that the index
    knows."""
    out: Annotated[str, tyro.conf.arg(aliases=["--store"], metavar="DIR|postgresql://…")] = ""
    """The index: a folder, made where it is missing, or a PostgreSQL database with pgvector."""
    model: str | None = None
    """Run (its best checkpoint) or checkpoint folder, open_clip NAME/TAG, hf-hub:… or local-dir:…; left out, the only
    one of the index."""
    name: str | None = None
    """What the index calls the model; its file name or tag when left out."""
    replace_model: bool = False
    """Make all vectors anew where the model of this name has other weights or another --precision than it had."""
    exclude: tuple[str, ...] = ()
    """Globs; files and folders that match one are left out: --exclude '*.gif' cache. The index remembers them; given
    anew they replace those of before, and --exclude '' clears them."""
    max_megapixels: float | None = None
    """Leave larger pictures out; left out, those above 179 (of JPEG 2,048). A larger limit takes larger pictures."""
    remove_all: bool = False
    """Remove all pictures of a source of which nothing is there any more."""
    merge: str | None = None
    """Another index, to be taken into this one."""
    faults: bool = False
    """List the files that could not be read, and why; index nothing."""
    image_column: str | None = None
    """Column of a table with the picture or its path."""
    caption_column: str | None = None
    """Column of a table with the caption."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the image tower; bf16 is for GPUs and for processors with AMX, others are slower in it. Left out, as the index
    has it, else fp32."""
    batch_size: int = 64
    """Pictures a forward pass, and a transaction."""
    workers: int | None = None
    """Decoding threads; left out, one per processor."""
    cache: CacheOptions = field(default_factory=CacheOptions)


def check(options: Options) -> None:
    from cloob.data.shards.spec import is_remote
    from cloob.models.source import check_source

    if options.max_megapixels is not None and not options.max_megapixels > 0:
        raise InputError(f"--max-megapixels is {options.max_megapixels:g}; more than 0 is wanted")
    if not options.out:
        raise InputError("--out is missing; it says where the index is to be (cloob index --help)")
    if options.model is not None:
        check_source(options.model)
    if not is_remote(options.out) and not (Path(options.out) / INDEX_FILE).exists():
        _check_new(options, Path(options.out))
        for source in options.sources:  # an index that is there may know one that is gone
            check_there(source)


def _check_new(options: Options, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out is the folder of the index")
    if folder.is_dir() and any(not entry.name.startswith(".tmp-") for entry in folder.iterdir()):
        raise InputError(f"{folder}: is a folder with other files in it; --out names a new one, or an index")
    if options.sources and options.model is None:
        raise InputError("--model is missing; a new index needs one, such as a run folder or RN50/openai")
    if not options.sources and not options.merge:
        raise InputError(f"{folder}: no index; name what is to be indexed: cloob index SRC --model M --out {folder}")


def run(options: Options) -> int:
    """Indexes and merges; 1 when a source could not be read, with what there is written."""
    from cloob.search.index import Index

    if options.faults:
        with Index.open(options.out) as index:
            for state in (state for source in index.store.sources() for state in index.store.states(source)):
                if state.fault is not None:
                    print(f"{printable(state.path)}: {printable(state.fault)}")
        return 0
    with _opened(options.out) as index:
        address, failed = index.store.address, False
        if options.sources or not options.merge:
            try:
                summary = _update(index, options)
            except KeyboardInterrupt:
                said = f"{len(index):,} pictures are in {address}, the same command goes on"
                print(f"cloob: interrupted; {said}", file=sys.stderr)
                return 130
            failed = _report(summary, address) if _is_first() else False
        if options.merge is not None:
            with Index.open(options.merge) as other:
                done = index.merge(other)
            said = f"{done.added:,} pictures added, {done.vectors:,} vectors, {done.present:,} known"
            print(f"{other.store.address}: {said}")
            if done.other:
                print(f"cloob: {done.other:,} pictures are other ones here; they stay as they are", file=sys.stderr)
        if _is_first():
            models = "".join(f", {printable(model.name)}" for model in index.models)
            print(f"{address}: {len(index):,} pictures{models}", flush=True)
            if len(index) and models and not failed:
                say_next(["search", address, "something red"], ["serve", address, "--open"])
    return 1 if failed else 0


@contextlib.contextmanager
def _opened(address: str) -> Iterator[Index]:
    """The index, made where it is missing, held against other processes; one that nothing came into is removed.

    Of several ranks the first one makes it and holds it. The system lets go of it when the process ends.
    """
    from cloob.search.index import Index, is_database, is_there

    if is_database(address):
        with Index.create(address) as index:
            yield index
        return
    folder, new = Path(address), not is_there(address)
    try:
        opened = Index.create(address) if new else Index.open(address, writable=True)
    except InputError:
        if not new or not is_there(address):  # else another rank was faster
            raise
        opened = Index.open(address, writable=True)
    with opened as index, contextlib.ExitStack() as held:
        if _is_first():
            held.enter_context(_lock(folder))
        try:
            yield index
        except Exception:
            if new and not index.models:
                index.close()
                for path in folder.glob(f"{INDEX_FILE}*"):
                    path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # other files are in it
                    folder.rmdir()
            raise


def _lock(folder: Path) -> contextlib.AbstractContextManager[object]:
    library = require("filelock", "train")
    try:
        lock: contextlib.AbstractContextManager[object] = library.FileLock(folder / f"{INDEX_FILE}.lock").acquire(0)
    except library.Timeout:
        raise InputError(f"another `cloob index` is at work on {folder}; wait until it is done") from None
    except OSError:
        raise InputError(f"{folder}: this index may not be written; check the permissions of the folder") from None
    return lock


def _update(index: Index, options: Options) -> Summary:
    from cloob.machine import decoders
    from cloob.search.scan.open import ScanOptions
    from cloob.search.update import UpdateOptions

    workers = decoders() if options.workers is None else options.workers
    settings = UpdateOptions(
        model=options.model,
        name=options.name,
        replace_model=options.replace_model,
        device=options.device,
        precision=options.precision,
        scan=ScanOptions(options.exclude, options.image_column, options.caption_column),
        batch_size=options.batch_size,
        workers=workers,
        max_megapixels=options.max_megapixels,
        remove_all=options.remove_all,
    )
    with Progress() as progress:
        show = functools.partial(progress.update, "pictures") if _is_first() else None
        return index.update(options.sources, settings, progress=show)


def _is_first() -> bool:
    """Whether this is the rank that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _report(summary: Summary, address: str) -> bool:
    """Says what was done, and on stderr what was not; whether a source could not be read, or nothing of it."""
    from cloob.search.scan.collection import EXAMPLES

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
    report_left_out(summary)
    if any(count > EXAMPLES for count in summary.faults.values()):
        print(f"cloob: all of them: {shell(['index', '--out', address, '--faults'])}", file=sys.stderr)
    for source, why in summary.refused.items():
        print(f"cloob: {printable(source)}: {printable(why)}", file=sys.stderr)
    nothing = not any(count for _, count in counts)
    return bool(summary.refused or summary.unread or nothing)
