"""``cloob search``: find pictures of an index by words and pictures."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import cloob
from cloob.commands.console import say
from cloob.commands.index import check_index
from cloob.commands.options import Device, Range
from cloob.errors import InputError, counted, printable
from cloob.search.records import Hit, Item, Results

if TYPE_CHECKING:
    from cloob.search.query import Query
    from cloob.search.where import Filter

FIELDS = (
    "id",
    "path",
    "source",
    "caption",
    "date",
    "width",
    "height",
    "bytes",
)


@dataclass(frozen=True)
class Options:
    """Find pictures of an index by words and pictures, with weights, filters and a
    cutoff below which nothing fits.

    A QUERY is words ("a red bird") or a picture (photo.jpg); several add up.

    +0.5:beach counts half. Put terms to subtract after --, as in: cloob search IDX
    beach +0.5:photo.jpg -- -people
    """

    index: Annotated[str, "IDX"]
    """An index, or a folder that `cloob find` has indexed."""
    query: Annotated[tuple[str, ...], "QUERY …"] = ()
    """Words and pictures; none with --like, or to list by --where alone."""
    where: str | None = None
    """Only among these: "date >= '2024' and caption like '%dog%'"; without a query
    newest first.
    """
    top: Annotated[int, Range(1, 100_000)] = 20
    """How many at most."""
    cutoff: float | Literal["auto", "none"] = "auto"
    """Standard deviations above unrelated queries; auto 3, pictures 2"""
    like: str | None = None
    """More like this picture of the index: its id or its path."""
    json: bool = False
    """Print one JSON object."""
    paths: bool = False
    """Print the paths alone."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def check_options(options: Options) -> None:
    """Refuses options that lack another, exclude each other, or are out of range."""
    if not (options.query or options.like or options.where is not None):
        raise InputError(
            'nothing to search for: give words ("a red bird"), a picture, --like ID or'
            " --where"
        )
    if options.cutoff != "auto" and not (options.query or options.like):
        raise InputError("--cutoff needs QUERY or --like; a list has no scores")
    if options.paths and options.json:
        raise InputError("--paths and --json exclude each other; give one of them")


def run(options: Options) -> int:
    """Searches, and prints what is found."""
    from cloob.search.query import Query, Term

    check_options(options)
    address = check_index(options.index)
    query = Query.parse(options.query)
    with cloob.Index.open(address) as index:
        # a mistake in it is named before a model is loaded
        condition = index.condition(options.where)
        if options.like is not None:
            id_ = find_item(index, options.like)
            query = Query((Term(id_), *query.terms))
        if query.needs_model:
            say(f"loading {printable(index.model().name)} …")
            index.embedder(device=options.device)
        results = (
            ranked(index, options, query)
            if query.terms
            else newest(index, condition, options.top)
        )
        if options.json:
            print_json(results, options)
        elif options.paths:
            print_paths([hit.item for hit in results.hits])
        else:
            print_lines(results)
        say_rest(index, results)
    return 0


def find_item(index: cloob.Index, like: str) -> int:
    """The id of the picture that is meant by its id or its path; links in it stay."""
    for path in (like, os.path.abspath(like)):  # noqa: PTH100
        if ids := index.store.ids_of(path):
            return ids[0]
    if like.isascii() and like.isdigit() and index.items([int(like[:18])]):
        return int(like[:18])
    raise InputError(
        f"--like {like}: no picture of {index.store.address} has this id or path"
    )


def ranked(index: cloob.Index, options: Options, query: Query) -> Results:
    """What fits a query best; of pictures like one of the index alone, a ranking
    without cutoff.
    """
    cutoff = None if options.cutoff == "none" else options.cutoff
    if cutoff == "auto" and not query.needs_model:
        cutoff = None
    return index.search(query, top=options.top, where=options.where, cutoff=cutoff)


def newest(index: cloob.Index, where: Filter | None, top: int) -> Results:
    ids = index.store.ids(where, limit=top, order="newest")
    hits = tuple(Hit(item, math.nan) for item in index.items(ids.tolist()))
    return Results(hits, index.store.count(where), 0, "")


def print_json(results: Results, options: Options) -> None:
    hits = []
    for hit in results.hits:
        fields: dict[str, object] = {name: getattr(hit.item, name) for name in FIELDS}
        fields["columns"] = dict(hit.item.columns)
        fields["score"] = None if math.isnan(hit.score) else round(hit.score, 6)
        fields["margin"] = None if hit.margin is None else round(hit.margin, 4)
        hits.append(fields)
    answer = {
        "query": options.query,
        "model": results.model or None,
        "searched": results.searched,
        "cut": results.cut,
        "hits": hits,
    }
    print(json.dumps(answer))


def print_lines(results: Results) -> None:
    """A line per hit, with tabs between its fields; in a list without a query the date
    stands in the place of the score, and there is no margin.
    """
    for hit in results.hits:
        item = hit.item
        first, second = item.date or "", ""
        if not math.isnan(hit.score):
            first = f"{hit.score:.4f}"
            second = "" if hit.margin is None else f"{hit.margin:.1f}"
        caption = (item.caption or "").strip().partition("\n")[0].rstrip()
        fields = (first, second, str(item.id), item.path, caption)
        print(*map(printable, fields), sep="\t")


def say_rest(index: cloob.Index, results: Results) -> None:
    """Says what the list does not show: pictures below the cutoff, or why it is
    empty.
    """
    n_hits, searched = len(results.hits), results.searched
    if not searched:
        say(f"no picture to search: {index.store.why_none()}")
    elif not results.model and searched > n_hits:
        say(f"{n_hits:,} of {searched:,} pictures, the newest; --top shows more")
    elif results.model and not n_hits:
        say(
            f"nothing fits among {searched:,} pictures; --cutoff none shows the nearest"
            " all the same"
        )


def print_paths(items: Sequence[Item]) -> None:
    """Paths as the file system has them.

    One with a line feed, which would make another path of what comes after it, is left
    out.
    """
    whole = [item.path for item in items if "\n" not in item.path]
    if len(whole) < len(items):
        count = counted(len(items) - len(whole), "paths")
        say(f"{count} with a line feed left out; --json prints all")
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode("".join(f"{path}\n" for path in whole)))
    sys.stdout.buffer.flush()
