"""``cloob find``: find pictures below a folder in one command: index what is new, then
search.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cloob
from cloob.commands import index, search
from cloob.commands.console import no_hints, say, say_next
from cloob.commands.options import Threads
from cloob.errors import InputError
from cloob.models.source import PHOTOS
from cloob.search.records import Busy


@dataclass(frozen=True)
class Options(search.Options):
    """Find pictures below a folder: index what is new or changed, then search as `cloob
    search` does.

    The index is kept in FOLDER/.cloob, or in the cache if that cannot be written.
    """

    index: Annotated[str, "FOLDER"] = ""
    """A folder of pictures, with its sub-folders."""
    model: str | None = None
    """As of `cloob index`; left out, the index's own, and for a new one the first of
    `cloob find --models`.
    """
    models: bool = False
    """List models for photos, and do nothing else."""
    workers: Threads = None
    """Decoding threads; left out, one per processor."""


def print_models() -> int:
    """Prints trained models for photos, the default first."""
    for name, megabytes, pixels, licence, languages in PHOTOS:
        size = f"{megabytes:5,} MB  {pixels} px"
        print(f"{name:<44}  {size}  {licence:<20}  {languages}")
    say_next(["find", "PHOTOS", "a red bird", "--model", PHOTOS[0].name])
    return 0


def run(options: Options) -> int:
    """Indexes and searches, or lists models; 1 where some of it could not be read."""
    if options.models:
        if options != Options(models=True):
            raise InputError("--models stands alone: cloob find --models")
        return print_models()
    check(options)
    place, model, sources = plan(options)
    index_code = bring_up_to_date(place, sources, model, options)
    if index_code == index.INTERRUPTED:
        return index_code
    return search.run(options) or index_code


def check(options: Options) -> None:
    """Names mistakes before pictures are indexed."""
    from cloob.search.database import is_there

    if not options.index:
        raise InputError("FOLDER is missing; name a folder of pictures")
    folder = Path(options.index)
    if is_there(folder):
        raise InputError(f"{folder}: is an index; cloob search takes it")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    search.check_options(options)
    from cloob.search import where
    from cloob.search.query import Query
    from cloob.search.sources import has_pictures

    Query.parse(options.query)
    if options.where:
        where.parse(options.where)
    if not has_pictures(folder):
        raise InputError(f"{folder}: no pictures in it")


def plan(options: Options) -> tuple[Path, str | None, tuple[str, ...]]:
    """Where the index lies, the model to load, or None for the index's own, and the
    sources to add.
    """
    from cloob.search.address import place_of
    from cloob.search.database import is_there

    place = place_of(Path(options.index))
    has_model = has_sources = False
    if is_there(place):
        with cloob.Index.open(place) as existing:
            has_model = existing.store.stored_model() is not None
            has_sources = bool(existing.store.sources())
    model = options.model
    if model is None and not has_model:
        model = PHOTOS[0].name
        say(
            f"the model is {model}: {PHOTOS[0].megabytes} MB, fetched once (cloob"
            " find --models lists others)"
        )
    return place, model, () if has_sources else (options.index,)


def bring_up_to_date(
    place: Path,
    sources: tuple[str, ...],
    model: str | None,
    options: Options,
) -> int:
    """Indexes what is new; its words go to stderr, as stdout is for what is found."""
    from cloob.search.database import is_there

    if is_there(place) and not os.access(place, os.W_OK):
        say(f"{place}: cannot be written, so what is new since is not in it")
        return 0
    update = index.Options(
        sources, str(place), model, device=options.device, workers=options.workers
    )
    try:
        with contextlib.redirect_stdout(sys.stderr), no_hints():
            return index.run(update)
    except Busy:
        say(
            "another `cloob find` or `cloob index` is at work here; searched is what it"
            " has done so far"
        )
        return 0
