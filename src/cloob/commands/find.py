"""``cloob find``: `cloob index` and `cloob search` in one, for a folder of photographs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import cloob
from cloob.commands import index, search
from cloob.commands.collection import INDEX_FILE, folder_name
from cloob.commands.console import DecodeOptions, RowOptions, refuse, say, tyro


@dataclass(frozen=True)
class Options(search.Options):
    """Find pictures below a folder: index what is new or changed, then search as `cloob search` does.

    The index is kept in FOLDER/.cloob, or in the cache if that cannot be written.
    """

    index: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """A folder of pictures, with its sub-folders."""
    model: str | None = None
    """As of `cloob index`; left out, the index's first, and for a new one the first of `cloob models --for photos`."""
    rows: tyro.conf.Suppress[RowOptions] = field(default_factory=RowOptions)
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def read(words: Sequence[str]) -> Options:
    return search.read(words, Options, "find FOLDER")


def run(options: Options) -> int:
    """Indexes and searches; 1 where some of it could not be read or copied."""
    from cloob.cache import cache_root
    from cloob.models.source import PHOTOS

    folder, model, name = Path(options.index), options.model, None
    refuse({f"{folder}: is an index; cloob search takes it": (folder / INDEX_FILE).exists()})
    refuse({f"{folder}: no such folder": not folder.is_dir()})
    search.check(options)
    place = folder / ".cloob"
    if not os.access(place if place.exists() else folder, os.W_OK):
        digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        place = cache_root() / "photos" / f"{folder_name(folder.resolve().name)}-{digest}"
    from cloob.search.address import is_there
    from cloob.search.query import Query
    from cloob.search.scan.collection import Folder

    Query.parse(options.query)  # a mistake in it is told before pictures are indexed
    refuse({f"{folder}: no pictures in it": next(Folder(folder).scan(), None) is None})
    if model is None and is_there(place):
        with cloob.Index.open(place) as there:
            name = next((each.name for each in there.models), None)
    if model is None and name is None:
        model = PHOTOS[0].name
        say(f"the model is {model}: {PHOTOS[0].megabytes} MB, fetched once (cloob models --for photos lists others)")
    with contextlib.redirect_stdout(sys.stderr):
        wanted = index.Options((str(folder),), str(place), model, name, machine=options.machine)
        code = index.run(wanted, then=False)
    if code == 130:
        return code
    return search.run(dataclasses.replace(options, index=str(place), model=model or name)) or code
