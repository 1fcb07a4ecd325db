"""``cloob index``: index a collection of pictures, or bring an index up to date."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

import cloob
from cloob.commands.console import (
    DecodeOptions,
    RowOptions,
    check,
    check_there,
    progress,
    refuse,
    say,
    say_next,
)
from cloob.errors import printable
from cloob.models.source import check_source
from cloob.search.records import Precision

if TYPE_CHECKING:
    from cloob.models.encoder import DualEncoder
    from cloob.search.build import Summary


@dataclass(frozen=True)
class Options:
    """Index pictures, or vectors with labels; or bring an index up to date: new,
    changed and removed files.
    """

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SRC …")] = ()
    """Folders of pictures, or what `cloob train --data` reads, captions or not; none:
    all that the index knows.
    """
    out: Annotated[str, arg(aliases=["--store"], metavar="DIR|postgresql://…")] = ""
    """The index: a folder, made where it is missing, or a PostgreSQL database with
    pgvector.
    """
    model: str | None = None
    """Run or model folder, NAME/TAG of open_clip, hf-hub:…; left out, the index's only
    one.
    """
    name: str | None = None
    """What the index calls the model; its file name or tag when left out."""
    replace_model: bool = False
    """Make all vectors anew where this model has other weights or --precision than
    before.
    """
    exclude: tuple[str, ...] = ()
    """Globs of files and folders to leave out; they are remembered, and '' clears them.
    """
    max_megapixels: float | None = None
    """Leave larger pictures out; left out, those above 179 (of JPEG 2,048)."""
    remove_all: bool = False
    """Remove all pictures of a source of which nothing is there any more."""
    moved: Annotated[tuple[str, str] | None, arg(metavar="OLD NEW")] = None
    """A folder of the index that has another name now; one that holds its index needs
    no word.
    """
    anew: bool = False
    """Delete the index first, of whatever format or however damaged it is."""
    merge: str | None = None
    """Another index, to be taken into this one."""
    faults: bool = False
    """List the files that could not be read, and why; index nothing."""
    labels: str | None = None
    """Names for the rows of --a or --b: as --ids of `cloob train vectors`."""
    vectors: str | None = None
    """Column of SRC, which is Parquet, with vectors of --model, which are taken as they
    are.
    """
    image_column: str | None = None
    """Column of a table with the picture or its path."""
    caption_column: str | None = None
    """Column of a table with the caption."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of the image tower (bf16: GPUs, AMX); else the index's, or fp32."""
    batch_size: int = 64
    """Pictures a forward pass, and a transaction."""
    rows: RowOptions = field(default_factory=RowOptions)
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def run(options: Options, *, then: bool = True) -> int:
    """Indexes and merges, and names what comes ``then``; 1 when a source could not be
    read, with the rest written.
    """
    from cloob.search.address import is_database, is_there, remove

    check(options, max_megapixels=(0.001, 100_000), batch_size=(1, 2**20))
    rows, other = (
        options.rows.given,
        options.sources or options.merge or options.precision,
    )
    pair = "--a and --b need --labels, and stand without SRC, --merge and --precision"
    refuse(
        {
            pair: (not options.labels or other) if rows else options.labels,
            "--vectors needs SRC": options.vectors and not options.sources,
            "--anew needs SRC and --model": options.anew
            and not (options.sources and options.model),
            "--out is missing; it names the index (cloob index --help)": not options.out,
        }
    )
    if options.model is not None:
        check_source(options.model)
    folder, database = Path(options.out), is_database(options.out)
    if not database and not is_there(
        options.out
    ):  # an index that is there may know a source that is gone
        filled = folder.is_dir() and any(
            not entry.name.startswith(".tmp-") for entry in folder.iterdir()
        )
        unnamed = f"{folder}: no index; name what is to be indexed: cloob index SRC --model M --out {folder}"
        modelless = "--model is missing; a new index needs one, such as a run folder or RN50/openai"
        refuse(
            {
                f"{folder}: is a file; --out is the folder of the index": folder.exists()
                and not folder.is_dir(),
                f"{folder}: is a folder with other files in it; --out names a new one, or an index": filled,
                modelless: (options.sources or rows) and options.model is None,
                unnamed: not options.sources and not rows and not options.merge,
            }
        )
        for source in options.sources:
            check_there(source)
    if options.faults:
        with cloob.Index.open(options.out) as index:
            for state in (
                state
                for source in index.store.sources()
                for state in index.store.states(source)
            ):
                if state.fault is not None:
                    print(f"{printable(state.path)}: {printable(state.fault)}")
        return 0
    if options.anew:
        from cloob.models.load import load_model  # torch

        for source in options.sources:  # nothing goes before these are there
            check_there(source)
        load_model(str(options.model))
        remove(options.out)
    new = not is_there(options.out)
    opened = (
        cloob.Index.create(options.out)
        if database or new
        else cloob.Index.open(options.out, writable=True)
    )
    with opened as index, index.store.exclusive():
        try:
            return _bring_up_to_date(index, options, then=then)
        except Exception:
            if (
                new and not index.models
            ):  # nothing came into it, and there are no other files in it
                index.close()
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _bring_up_to_date(index: cloob.Index, options: Options, *, then: bool) -> int:
    from cloob.search.build import Rows
    from cloob.search.scan.open import ScanOptions, source_name
    from cloob.search.update import UpdateOptions

    if options.moved:
        index.store.move(*map(source_name, options.moved))
    rows = options.rows.given and Rows(*options.rows.given, str(options.labels))
    address, failed, things, done = (
        index.store.address,
        False,
        "rows" if rows else "pictures",
        "",
    )
    if options.sources or not options.merge:
        same = (
            "model",
            "name",
            "replace_model",
            "precision",
            "batch_size",
            "max_megapixels",
            "remove_all",
        )
        more: dict[str, Any] = {name: getattr(options, name) for name in same}
        scan = ScanOptions(
            options.exclude,
            options.image_column,
            options.caption_column,
            options.vectors,
        )
        settings = UpdateOptions(
            device=options.machine.device,
            scan=scan,
            workers=options.machine.workers,
            **more,
        )
        try:
            with progress() as update:
                summary = index.update(
                    rows or options.sources,
                    settings,
                    progress=functools.partial(update, things),
                )
        except KeyboardInterrupt:
            say(
                f"interrupted; {len(index):,} {things} are in {address}, the same command goes on"
            )
            return 130
        counts = {
            "added": summary.added,
            "changed": summary.changed,
            "with a new date, size or caption": summary.described,
            "known, with a vector of this model now": summary.completed,
            "removed": summary.removed,
            "as they were": summary.unchanged,
        }
        kinds = ", ".join(
            f"{count:,} {what}" for what, count in counts.items() if count
        )
        speed = (
            f" ({summary.embedded / summary.seconds:,.0f} a second)"
            if summary.embedded > 1
            else ""
        )
        done = f"; {kinds or 'none'}; {summary.embedded:,} embedded in {summary.seconds:,.1f} s{speed}"
        left = {
            "not read": summary.faults.total(),
            "left out": summary.left_out.counts.total(),
        }
        done += "".join(f"; {count:,} {what}" for what, count in left.items() if count)
        failed = bool(summary.refused or summary.unread or not kinds)
        if then:
            advice = (
                f"; cloob index --out {address} --faults lists those not read"
                if summary.faults
                else ""
            )
            report_left_out(summary, advice)
        for source, why in summary.refused.items():
            say(f"{printable(source)}: {printable(why)}")
    if options.merge is not None:
        with cloob.Index.open(options.merge) as other:
            merged = index.merge(other)
            added = f"{merged.added:,} pictures added, {merged.vectors:,} vectors, {merged.present:,} known"
            print(f"{other.store.address}: {added}")
        if merged.other:
            say(f"{merged.other:,} pictures are other ones here; they stay as they are")
    models = "".join(f", {printable(model.name)}" for model in index.models)
    print(f"{address}: {len(index):,} {things}{models}{done}", flush=True)
    if then and len(index) and models and not failed and not rows:
        say_next(["search", address, "something red"])
    return 1 if failed else 0


def check_index(typed: str) -> tuple[str, str | None]:
    """The address of the index that is meant, and the filter of a folder in it; refuses
    a place without one.
    """
    from cloob.search.address import find_index, is_there

    address, within = find_index(typed)
    there = "is a file" if Path(address).is_file() else "holds no index"
    what = there if Path(address).exists() else "no such folder"
    refuse(
        {
            f"{address}: {what}; cloob index SRC --model M --out NAME.idx makes one": not is_there(
                address
            )
        }
    )
    return address, within


@contextlib.contextmanager
def opened(
    source: str,
    model: str | DualEncoder | None,
    machine: DecodeOptions,
    precision: Precision | None = None,
) -> Iterator[tuple[cloob.Index, int]]:
    """An index of a source, and how many of its pictures, folders and shards could not
    be read; some are named.

    Pictures are embedded into an index that is gone at the end. The model is one of an
    index, by name or by what it is loaded from; or for pictures what ``load_model``
    takes, or a loaded one.
    """
    from cloob.search.address import is_there

    if is_there(source):
        with cloob.Index.open(
            source, model=model if isinstance(model, str) else None
        ) as index:
            yield index, 0
        return
    if "://" not in source:
        check_there(source)
    refuse(
        {
            "no model given: --model names a run folder, or NAME/TAG of open_clip": model
            is None
        }
    )
    if isinstance(model, str):
        check_source(model)
    from cloob.search.update import UpdateOptions

    options = UpdateOptions(
        model, device=machine.device, precision=precision, workers=machine.workers
    )
    with (
        tempfile.TemporaryDirectory(prefix="cloob-") as folder,
        cloob.Index.create(Path(folder) / "index") as index,
    ):
        with progress() as update:
            done = index.update(
                [source], options, progress=functools.partial(update, "pictures")
            )
        refuse(
            {f"{printable(place)}: {why}": True for place, why in done.refused.items()}
        )
        report_left_out(done)
        yield index, done.faults.total() + done.unread


def report_left_out(summary: Summary, more: str = "") -> None:
    """Names on one line what of the sources is left out, and why."""
    reasons = []
    for kind in (summary.unreadable, summary.left_out):
        for reason, count in kind.counts.most_common():
            example, *others = map(printable, kind.examples[reason])
            reasons.append(f"{count:,} × {reason}: {example}{', …' if others else ''}")
    if reasons:
        say(f"left out: {'; '.join(reasons)}{more}")


def folder_name(label: str) -> str:
    name = re.sub(r"[/\\]", "_", printable(label)).strip()
    return "_" if name in ("", ".", "..") else name[:200]
