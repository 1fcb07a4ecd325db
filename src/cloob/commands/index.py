"""``cloob index``: makes an index of pictures, or brings one up to date."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import cloob
from cloob.commands.collection import INDEX_FILE, report_left_out
from cloob.commands.console import DecodeOptions, RowOptions, check_there, progress, refuse, say, say_next, tyro, within
from cloob.errors import printable

if TYPE_CHECKING:
    from cloob.search.build import Summary


@dataclass(frozen=True)
class Options:
    """Index pictures, or vectors with labels; or bring an index up to date: new, changed and removed files."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SRC …")] = ()
    """Folders of pictures, or what `cloob train --data` reads, captions or not; none: all that the index knows."""
    out: Annotated[str, tyro.conf.arg(aliases=["--store"], metavar="DIR|postgresql://…")] = ""
    """The index: a folder, made where it is missing, or a PostgreSQL database with pgvector."""
    model: str | None = None
    """Run or model folder, open_clip NAME/TAG, hf-hub:… or local-dir:…; left out, the only one of the index."""
    name: str | None = None  # What the index calls the model; its file name or tag when left out.
    replace_model: bool = False
    """Make all vectors anew where the model of this name has other weights or another --precision than it had."""
    exclude: tuple[str, ...] = ()
    """Globs of files and folders to leave out; the index remembers them, and --exclude '' clears them."""
    max_megapixels: float | None = None  # Leave larger pictures out; left out, those above 179 (of JPEG 2,048).
    remove_all: bool = False  # Remove all pictures of a source of which nothing is there any more.
    moved: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="OLD NEW")] = None
    """A folder of the index that has another name now; one that holds its index needs no word."""
    anew: bool = False  # Delete the index first, of whatever format or however damaged it is.
    merge: str | None = None  # Another index, to be taken into this one.
    faults: bool = False  # List the files that could not be read, and why; index nothing.
    labels: str | None = None  # Names for the rows of --a or --b: as --ids of `cloob train vectors`.
    vectors: str | None = None
    """Column of SRC, which is Parquet, with vectors that --model has made: they are taken as they are."""
    image_column: str | None = None  # Column of a table with the picture or its path.
    caption_column: str | None = None  # Column of a table with the caption.
    precision: Literal["fp32", "bf16"] | None = None
    """Of the image tower; bf16 is for GPUs and processors with AMX. Left out, as the index has it, else fp32."""
    batch_size: int = 64  # Pictures a forward pass, and a transaction.
    rows: RowOptions = field(default_factory=RowOptions)
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def _check(options: Options) -> None:
    from cloob.models.source import check_source
    from cloob.search.address import is_database

    within(options, max_megapixels=(0.001, 100_000), batch_size=(1, 2**20))
    rows, other = options.rows.given, options.sources or options.merge or options.precision
    pair = "--a and --b need --labels, and stand without SRC, --merge and --precision"
    refuse({pair: (not options.labels or other) if rows else options.labels})
    refuse({"--vectors needs SRC": options.vectors and not options.sources})
    refuse({"--anew needs SRC and --model": options.anew and not (options.sources and options.model)})
    refuse({"--out is missing; it says where the index is to be (cloob index --help)": not options.out})
    if options.model is not None:
        check_source(options.model)
    folder = Path(options.out)
    if is_database(options.out) or (folder / INDEX_FILE).exists():
        return  # an index that is there may know a source that is gone
    filled = folder.is_dir() and any(not entry.name.startswith(".tmp-") for entry in folder.iterdir())
    unnamed = f"{folder}: no index; name what is to be indexed: cloob index SRC --model M --out {folder}"
    modelless = "--model is missing; a new index needs one, such as a run folder or RN50/openai"
    refuse(
        {
            f"{folder}: is a file; --out is the folder of the index": folder.exists() and not folder.is_dir(),
            f"{folder}: is a folder with other files in it; --out names a new one, or an index": filled,
            modelless: (options.sources or rows) and options.model is None,
            unnamed: not options.sources and not rows and not options.merge,
        }
    )
    for source in options.sources:
        check_there(source)


def run(options: Options, *, then: bool = True) -> int:
    """Indexes and merges, and says what to do ``then``; 1 when a source could not be read, with the rest written."""
    _check(options)
    from cloob.search.address import remove
    from cloob.search.scan.open import source_name

    if options.faults:
        with cloob.Index.open(options.out) as index:
            for state in (state for source in index.store.sources() for state in index.store.states(source)):
                if state.fault is not None:
                    print(f"{printable(state.path)}: {printable(state.fault)}")
        return 0
    if options.anew:
        remove(options.out)
    with _opened(options.out) as index:
        if options.moved:
            index.store.move(*map(source_name, options.moved))
        address, failed, things = index.store.address, False, "rows" if options.rows.given else "pictures"
        if options.sources or not options.merge:
            try:
                summary = _update(index, options, things)
            except KeyboardInterrupt:
                say(f"interrupted; {len(index):,} {things} are in {address}, the same command goes on")
                return 130
            failed = _report(summary, address, things)
        if options.merge is not None:
            with cloob.Index.open(options.merge) as other:
                done = index.merge(other)
                added = f"{done.added:,} pictures added, {done.vectors:,} vectors, {done.present:,} known"
                print(f"{other.store.address}: {added}")
            if done.other:
                say(f"{done.other:,} pictures are other ones here; they stay as they are")
        models = "".join(f", {printable(model.name)}" for model in index.models)
        print(f"{address}: {len(index):,} {things}{models}", flush=True)
        if then and len(index) and models and not failed and things == "pictures":
            say_next(["search", address, "something red"], ["serve", address, "--open"])
    return 1 if failed else 0


@contextlib.contextmanager
def _opened(address: str) -> Iterator[cloob.Index]:
    """The index, made where it is missing, while nobody else updates it; one that nothing came into is removed."""
    from cloob.search.address import is_database, is_there

    folder, database, new = Path(address), is_database(address), not is_there(address)
    opened = cloob.Index.create(address) if database or new else cloob.Index.open(address, writable=True)
    with opened as index, index.store.exclusive():
        try:
            yield index
        except Exception:
            if new and not index.models:  # there are no other files in it
                index.close()
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _update(index: cloob.Index, options: Options, things: str) -> Summary:
    from cloob.search.scan.open import ScanOptions
    from cloob.search.scan.vectors import Rows
    from cloob.search.update import UpdateOptions

    settings = UpdateOptions(
        model=options.model,
        name=options.name,
        replace_model=options.replace_model,
        device=options.machine.device,
        precision=options.precision,
        scan=ScanOptions(options.exclude, options.image_column, options.caption_column, options.vectors),
        batch_size=options.batch_size,
        workers=options.machine.threads(),
        max_megapixels=options.max_megapixels,
        remove_all=options.remove_all,
    )
    rows = options.rows.given and Rows(*options.rows.given, str(options.labels))
    with progress() as update:
        return index.update(rows or options.sources, settings, progress=functools.partial(update, things))


def _report(summary: Summary, address: str, things: str) -> bool:
    """Says what was done and what was not; whether a source could not be read, or nothing of it."""
    from cloob.search.scan.collection import EXAMPLES

    counts = {
        "added": summary.added,
        "changed": summary.changed,
        "with a new date, size or caption": summary.described,
        "known, with a vector of this model now": summary.completed,
        "removed": summary.removed,
        "as they were": summary.unchanged,
    }
    done = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    speed = f" ({summary.embedded / summary.seconds:,.0f} a second)" if summary.embedded > 1 else ""
    print(f"{things}: {done or 'none'}; {summary.embedded:,} embedded in {summary.seconds:,.1f} s{speed}")
    report_left_out(summary)
    if any(count > EXAMPLES for count in summary.faults.values()):
        say_next(["index", "--out", address, "--faults"])
    for source, why in summary.refused.items():
        say(f"{printable(source)}: {printable(why)}")
    return bool(summary.refused or summary.unread or not done)
