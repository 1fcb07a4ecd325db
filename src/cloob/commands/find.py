"""``cloob find``: find pictures below a folder in one command: index what is new, then
search.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

import cloob
from cloob.commands import index, search
from cloob.commands.console import (
    DecodeOptions,
    RowOptions,
    refuse,
    say,
    say_next,
)
from cloob.errors import InputError
from cloob.models.source import PHOTOS
from cloob.search.records import Busy


@dataclass(frozen=True)
class Options(search.Options):
    """Find pictures below a folder: index what is new or changed, then search as `cloob
    search` does.

    The index is kept in FOLDER/.cloob, or in the cache if that cannot be written.
    `cloob find --models` lists models for photos.
    """

    index: Annotated[Positional[str], arg(metavar="FOLDER")]
    """A folder of pictures, with its sub-folders."""
    model: str | None = None
    """As of `cloob index`; left out, the index's first, and for a new one the first of
    `cloob find --models`.
    """
    rows: Suppress[RowOptions] = field(default_factory=RowOptions)
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def read(words: Sequence[str]) -> Options | None:
    """Options; None for ``--models``."""
    if "--models" in words:
        if len(words) > 1:
            raise InputError("--models stands alone: cloob find --models")
        return None
    options: Options = search.read(words, kind=Options, command="find FOLDER")
    return options


def print_models() -> int:
    """Prints trained models for photos, the default first."""
    for name, megabytes, pixels, licence, languages in PHOTOS:
        size = f"{megabytes:5,} MB  {pixels} px"
        print(f"{name:<44}  {size}  {licence:<20}  {languages}")
    say_next(["find", "PHOTOS", "a red bird", "--model", PHOTOS[0].name])
    return 0


def run(options: Options | None) -> int:
    """Indexes and searches; 1 where some of it could not be read or copied.

    Without options it prints models.
    """
    if options is None:
        return print_models()
    from cloob.search.address import find_index, is_there, new_place

    folder, model, name = Path(options.index), options.model, None
    refuse({f"{folder}: is an index; cloob search takes it": is_there(folder)})
    refuse({f"{folder}: no such folder": not folder.is_dir()})
    search.check_options(options)
    from cloob.search import where
    from cloob.search.query import Query
    from cloob.search.scan.collection import Folder

    Query.parse(options.query)  # mistakes are reported before pictures are indexed
    if options.where:
        where.parse(options.where)
    refuse({f"{folder}: no pictures in it": next(Folder(folder).scan(), None) is None})
    place, _ = find_index(options.index)
    sources: tuple[str, ...] = (options.index,)
    if is_there(place := place if is_there(place) else str(new_place(folder))):
        with cloob.Index.open(place) as there:
            name = next((item.name for item in there.models if model is None), None)
            sources = () if there.store.sources() else sources
    if model is None and name is None:
        model = PHOTOS[0].name
        say(
            f"the model is {model}: {PHOTOS[0].megabytes} MB, fetched once (cloob"
            " find --models lists others)"
        )
    code = 0
    if is_there(place) and not os.access(place, os.W_OK):
        say(f"{place}: cannot be written, so what is new since is not in it")
    else:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                code = index.run(
                    index.Options(sources, place, model, name, machine=options.machine),
                    then=False,
                )
        except Busy:
            say(
                "another `cloob find` or `cloob index` is at work here; searched is"
                " what it has done so far"
            )
    return (
        code
        if code == 130
        else search.run(dataclasses.replace(options, model=model or name)) or code
    )
