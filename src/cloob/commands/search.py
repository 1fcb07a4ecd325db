"""``cloob search``: find pictures of an index by words and pictures; duplicates."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cloob
from cloob.commands.console import (
    DeviceOptions,
    Positional,
    RowOptions,
    arg,
    check,
    parse,
    refuse,
    say,
)
from cloob.commands.copies import copy
from cloob.commands.index import check_index
from cloob.errors import InputError, counted, printable
from cloob.search.records import Hit, Item, Results
from cloob.search.where import Filter, equals

if TYPE_CHECKING:
    from cloob.search.query import Query


@dataclass(frozen=True)
class Options:
    """Find pictures of an index by words and pictures, with weights, filters and a
    cutoff below which nothing fits.

    A QUERY is words ("a red bird"), a picture (photo.jpg) or its https:// address;
    several add up.

    +0.5:beach counts half. Put terms to subtract after --, as in: cloob search IDX
    beach +0.5:photo.jpg -- -people
    """

    index: Annotated[Positional[str], arg(metavar="IDX")]
    """An index, or a folder that `cloob find` has indexed."""
    query: Annotated[Positional[tuple[str, ...]], arg(metavar="QUERY …")] = ()
    """Words, pictures and addresses; none with --like or --duplicates, or to list by
    --where alone.
    """
    where: str | None = None
    """Only among these: "date >= 2024 and caption like '%dog%'"; without a query newest
    first.
    """
    top: int = 20
    """How many at most."""
    cutoff: float | Literal["auto", "none"] = "auto"
    """Standard deviations above unrelated queries; auto 3, pictures 2"""
    by: Literal["meaning", "words", "both"] = "both"
    """By the model, by all words in name, caption or columns, or both."""
    like: str | None = None
    """More like this picture of the index: its id or its path."""
    duplicates: bool = False
    """Groups of look-alikes, the best first: RAW, most pixels, EXIF, most bytes,
    oldest.
    """
    threshold: float = 0.97
    """Of --duplicates: the least cosine of any two pictures of a group."""
    exact: bool = False
    """Of --duplicates: files of equal bytes alone."""
    rest: bool = False
    """Of --duplicates: print the paths of all but the best of a group; with -0 for
    xargs -0.
    """
    explain: bool = False
    """The pictures that the query retrieves as from a Hopfield memory, with their
    weights.
    """
    beta: float | None = None
    """Of --explain: small averages all pictures, large takes the nearest; else the
    model's.
    """
    json: bool = False
    """Print one JSON object."""
    paths: bool = False
    """Print the paths alone; of --duplicates all, with an empty line between groups."""
    null: bool = False
    """End paths with a NUL instead of a line feed; also -0."""
    copy_to: Path | None = None
    """Copy what is found into this folder; nothing there is overwritten."""
    model: str | None = None
    """A model of the index, by its name or by what it is loaded from; left out, the
    first.
    """
    rows: RowOptions = field(default_factory=RowOptions)
    machine: DeviceOptions = field(default_factory=DeviceOptions)


def read(words: Sequence[str], kind: Any = Options, command: str = "search IDX") -> Any:
    """The options of a command, and the terms after the first ``--``, whatever these
    begin with.
    """
    place = list(words).index("--") if "--" in words else len(words)
    before = ["--null" if word == "-0" else word for word in words[:place]]
    for previous, word in itertools.pairwise(["", *before]):
        is_value = previous.startswith("--") and re.fullmatch(
            r"-[\d.]+(e[+-]?\d+)?", word
        )
        if word[:1] == "-" and word[1:2].isalnum() and word != "-h" and not is_value:
            raise InputError(
                f"{word}: put terms to subtract after --, as in: cloob {command} beach -- {word}"
            )
    options = parse(kind, before, f"cloob {command.partition(' ')[0]}")
    return dataclasses.replace(options, query=(*options.query, *words[place + 1 :]))


def check_options(options: Options) -> None:
    rules = [
        "paths excludes json rest",
        "json excludes rest",
        "exact excludes threshold",
    ]
    rules += [
        "duplicates excludes query like explain top cutoff",
        "explain excludes paths copy_to cutoff",
    ]
    rules += [
        f"{side} excludes query like duplicates explain cutoff paths copy_to"
        for side in "ab"
    ]
    rules += [
        "threshold needs duplicates",
        "exact needs duplicates",
        "rest needs duplicates",
    ]
    rules += ["null needs paths or rest", "beta needs explain"]
    ranges = {
        "top": (1, 100_000),
        "threshold": (0.001, 1),
        "beta": (1e-6, 1e6),
        "cutoff": (-1e9, 1e9),
    }
    check(options, *rules, **ranges)
    nothing = 'nothing to search for: give words ("a red bird"), a picture, --like ID or --where'
    query = options.query or options.like
    refuse(
        {
            nothing: not (
                options.duplicates or query or options.where or options.rows.given
            ),
            "--explain needs a query": options.explain and not query,
            f"{options.copy_to}: is a file; --copy-to names a folder": options.copy_to
            and options.copy_to.is_file(),
        }
    )


def run(options: Options) -> int:
    """Searches; 1 where a match could not be copied."""
    check_options(options)
    address, below = check_index(options.index)
    if below:
        options = dataclasses.replace(
            options, where=f"({options.where}) and {below}" if options.where else below
        )
    from cloob.search.query import Query, Term

    query, like, device = (
        Query.parse(options.query),
        options.like,
        options.machine.device,
    )
    with cloob.Index.open(address, model=options.model) as index:
        index.view(options.where)  # a mistake in it is named before a model is loaded
        if options.duplicates:
            return _duplicates(index, options)
        if options.rows.given:
            return _search_rows(index, options, *options.rows.given)
        if like is not None:
            filters = [equals("path", path) for path in (like, os.path.abspath(like))]  # noqa: PTH100 - links stay
            filters += (
                [Filter(f"id = {like[:18]}")]
                if like.isascii() and like.isdigit()
                else []
            )
            item = next(
                (
                    id_
                    for where in filters
                    for id_ in index.store.ids(where, limit=1).tolist()
                ),
                0,
            )
            refuse(
                {
                    f"--like {like}: no picture of {index.store.address} has this id or path": not item
                }
            )
            query = Query((Term(item, "item"), *query.terms))
        own_beta = options.explain and options.beta is None  # that of the model
        if own_beta or (
            query.needs_model and (options.explain or options.by != "words")
        ):
            say(f"loading {printable(index.model().name)} …")
            (index.encoder if own_beta else index.embedder)(device=device)
        return (_explain if options.explain else _search)(index, options, query)


def _search(index: cloob.Index, options: Options, query: Query) -> int:
    """Prints what a query finds, or without one the newest pictures; on a line equal
    files and those of a shot.
    """
    from cloob.search.alike import first_alike

    if query.terms:
        cutoff = None if options.cutoff == "none" else options.cutoff
        if cutoff == "auto" and not query.needs_model:
            cutoff = None  # pictures like one of the index are a ranking
        result = index.search(
            query, top=options.top, where=options.where, cutoff=cutoff, by=options.by
        )
    else:
        where = index.view(options.where).where
        items = index.items(
            index.store.ids(where, limit=options.top, order="newest").tolist()
        )
        result = Results(
            tuple(Hit(item, math.nan) for item in items),
            index.store.count(where),
            0,
            "",
        )
    hits, searched, person = result.hits, result.searched, sys.stdout.isatty()
    firsts = (
        [] if options.json or options.paths else first_alike(hit.item for hit in hits)
    )
    files = Counter(firsts)  # how many stand on the line of a first one
    if options.json:
        facts = {
            "query": options.query,
            "model": result.model or None,
            "searched": searched,
            "cut": result.cut,
        }
        print(json.dumps({**facts, "hits": [_facts(hit.item, hit) for hit in hits]}))
    elif options.paths:
        _print_paths([[hit.item for hit in hits]], null=options.null)
    for hit in (
        hit for hit, first in zip(hits, firsts, strict=False) if hit.item.id == first
    ):
        item, margin = hit.item, "" if hit.margin is None else f"{hit.margin:.1f}"
        if math.isnan(hit.score):
            numbers, widths = [item.date or "", printable(item.date_from)], (19, 6)
        else:
            numbers, widths = (
                [f"{hit.score:.3f}" if person else f"{hit.score:.4f}", margin],
                (6, 5),
            )
        marks = [printable(", ".join(hit.words))] if hit.words else []
        more = [f"+{files[item.id] - 1}"] if files[item.id] > 1 else []
        if person:
            columns = [
                f"{number:>{width}}"
                for number, width in zip(numbers, widths, strict=True)
            ]
            print(
                _aligned(
                    "  ".join([*columns, *(f"[{mark}]" for mark in marks), *more]), item
                )
            )
        else:
            caption = printable(
                (item.caption or "").strip().partition("\n")[0].rstrip()
            )
            print(
                *numbers,
                item.id,
                printable(item.path),
                caption,
                *marks,
                *more,
                sep="\t",
            )
    if not query.terms and searched > len(hits):
        say(f"{len(hits):,} of {searched:,} pictures, the newest; --top shows more")
    elif not searched:
        say(
            f"no picture to search: {index.view(options.where, result.model or None).why_none()}"
        )
    elif not hits and options.by == "words":
        say(
            f"none of {searched:,} pictures has these words in its name, caption or columns"
        )
    elif not hits and not result.cut:
        say("there is no other picture to search")
    elif not hits:
        say(
            f"nothing fits among {searched:,} pictures; --cutoff none shows the nearest all the same"
        )
    elif result.cut and person:
        say(f"{result.cut} more are below the cutoff (--cutoff none shows them)")
    return copy(index, [hit.item for hit in hits], options.copy_to)


def _search_rows(
    index: cloob.Index, options: Options, side: Literal["a", "b"], file: str
) -> int:
    """Prints the nearest to every row of a file; 1 where one is not finite."""
    from cloob.data.vectors import read_matrix
    from cloob.models.aligned.model import embed_rows
    from cloob.search.find import search

    view, result = index.view(options.where), []
    view.check_some(index.store.count(view.where))
    queries = embed_rows(
        index.encoder(view.model, options.machine.device), side, read_matrix(file)
    )
    finite = queries.isfinite().all(1).tolist()
    for row, query in enumerate(queries.numpy()):
        hits = search(view, query, options.top).hits if finite[row] else ()
        result.append([_facts(hit.item, hit) for hit in hits])
        for hit in () if options.json else hits:
            print(row, f"{hit.score:.4f}", printable(hit.item.path), sep="\t")
    if options.json:
        print(json.dumps({"query": [file], "model": view.model.name, "rows": result}))
    if bad := finite.count(False):
        say(
            f"{file}: {counted(bad, 'rows')} left out, as not finite: row {finite.index(False)} …"
        )
    return 1 if bad else 0


def _duplicates(index: cloob.Index, options: Options) -> int:
    """Prints groups; in JSON ``equal`` is the id of the first picture with the same
    bytes, None for that one.
    """
    from cloob.search import alike

    view = index.view(options.where)
    result = alike.present(
        view, alike.look_alikes(view, options.threshold, exact=options.exact)
    )
    items, rows = (
        [[hit.item for hit in group] for group in result.groups],
        list[list[dict[str, Any]]](),
    )
    for group in result.groups:
        rows.append([])
        first: dict[str, int] = {}
        for hit in group:
            same = first.setdefault(hit.item.content, hit.item.id)
            rows[-1].append(
                _facts(
                    hit.item,
                    cosine=round(hit.score, 6),
                    equal=None if same == hit.item.id else same,
                )
            )
    if options.json:
        print(
            json.dumps(
                {
                    "threshold": None if options.exact else options.threshold,
                    "groups": rows,
                }
            )
        )
    elif options.paths:
        _print_paths(items, null=options.null)
    elif options.rest:
        _print_paths(
            [[item for group in result.groups for item in alike.rest(group)]],
            null=options.null,
        )
    for number, twins in enumerate(
        [] if options.json or options.paths or options.rest else rows
    ):
        print(end="\n" if number else "")
        for row in twins:
            more = [] if row["equal"] is None else [f"same bytes as {row['equal']}"]
            size, date = (
                f"{row['width']}x{row['height']}",
                f"{row['date'] or ''} {row['date_from']}".strip(),
            )
            print(
                f"{row['cosine']:.4f}",
                size,
                row["bytes"],
                row["id"],
                printable(row["path"]),
                date,
                *more,
                sep="\t",
            )
    every = [item for group in items for item in group]
    copies = [
        count for count in Counter(item.content for item in every).values() if count > 1
    ]
    counts = f"{counted(len(copies), 'groups')} equal byte by byte, {counted(sum(copies), 'files')}"
    if not options.exact:
        counts = f"{counted(len(rows), 'groups')} of look-alikes, {counted(len(every), 'pictures')} ({counts})"
    if not rows:
        counts = (
            "no files are equal"
            if options.exact
            else f"no look-alikes (cosine {options.threshold:g} and above)"
        )
    say(counts)
    if result.twice:
        say(
            f"{counted(result.twice, 'second names')} of a file (links, or a disk mounted twice) left out"
        )
    if result.stale:
        again = f"cloob index --out {index.store.address} looks again"
        say(
            f"{counted(result.stale, 'files')} left out: gone, or changed since indexed; {again}"
        )
    return copy(index, every, options.copy_to)


def _explain(index: cloob.Index, options: Options, query: Query) -> int:
    result = index.explain(
        query, beta=options.beta, top=options.top, where=options.where
    )
    if options.json:
        names = ("beta", "memory", "collection", "effective", "agreement", "model")
        pictures = [
            _facts(shown.item, weight=shown.weight, score=shown.score)
            for shown in result.pictures
        ]
        facts = {name: getattr(result, name) for name in names} | {"pictures": pictures}
        print(
            json.dumps(
                facts | {"nearest": [_facts(hit.item, hit) for hit in result.nearest]}
            )
        )
        return 0
    part = (
        ""
        if result.memory == result.collection
        else f" (the nearest of {result.collection:,})"
    )
    print(
        f"β = {result.beta:g}: of {result.memory:,} pictures{part} some {result.effective:,.1f} take part;"
    )
    print(
        f"what they make has a cosine of {result.agreement:.3f} with the query. By weight:"
    )
    for picture in result.pictures:
        print(_aligned(f"{picture.weight:7.2%}  {picture.score:6.3f}", picture.item))
    print("Nearest to what was retrieved:")
    for hit in result.nearest:
        print(_aligned(f"{'':9}{hit.score:6.3f}{'':7}", hit.item))
    return 0


def _facts(item: Item, hit: Hit | None = None, **more: Any) -> dict[str, Any]:
    if hit is not None:
        more["score"] = None if math.isnan(hit.score) else round(hit.score, 6)
        more["margin"] = None if hit.margin is None else round(hit.margin, 4)
        more["words"] = hit.words
    names = (
        "id",
        "path",
        "source",
        "caption",
        "date",
        "date_from",
        "width",
        "height",
        "bytes",
    )
    return (
        more
        | {name: getattr(item, name) for name in names}
        | {"columns": dict(item.columns)}
    )


def _aligned(numbers: str, item: Item) -> str:
    """A line of numbers, id, path and the caption's first line, cut to the width of a
    terminal.
    """
    before = f"{numbers}  {item.id:>6}  {printable(item.path)}  "
    caption = printable((item.caption or "").strip().partition("\n")[0].rstrip())
    room = shutil.get_terminal_size().columns - len(before)
    if sys.stdout.isatty() and len(caption) > room:
        caption = f"{caption[: room - 1]}…" if room > 1 else ""
    return (before + caption).rstrip()


def _print_paths(groups: Sequence[Sequence[Item]], *, null: bool) -> None:
    """Paths as the file system has them, with an empty one between groups.

    One with a line feed, which would make another path of what comes after it, is left
    out.
    """
    end = "\0" if null else "\n"
    if (
        broken := []
        if null
        else [item.path for group in groups for item in group if "\n" in item.path]
    ):
        say(
            f"{counted(len(broken), 'paths')} with a line feed left out: {printable(broken[0])}; -0 prints all"
        )
    blocks = [
        "".join(item.path + end for item in group if item.path not in broken)
        for group in groups
    ]
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(end.join(blocks)))
    sys.stdout.buffer.flush()
