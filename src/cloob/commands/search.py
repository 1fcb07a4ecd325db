"""``cloob search``: finds pictures of an index."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cloob.commands.collection import check_index
from cloob.commands.copies import put
from cloob.commands.options import HTML, CacheOptions, check_out, exclusive, goes_with, parse, tyro
from cloob.commands.terminal import hint
from cloob.errors import InputError, counted, message, printable

if TYPE_CHECKING:
    from cloob.search.index import Index
    from cloob.search.query import Query
    from cloob.search.records import Hit, Item, Results

_NUMBER = re.compile(r"-[\d.]+(e[+-]?\d+)?").fullmatch  # the value of an option
_MAX_TOP = 100_000


@dataclass(frozen=True)
class Options:
    """Find pictures of an index by words and pictures, with weights, filters and a cutoff below which nothing fits.

    A QUERY is words ("a red bird"), a picture (photo.jpg) or its https:// address; several add up. +0.5:beach counts
    half. Put terms to subtract after --, as in: cloob search IDX beach +0.5:photo.jpg -- -people
    """

    index: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IDX")]
    """What `cloob index` made: a folder, or postgresql://…."""
    query: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="QUERY …")] = ()
    """Words, pictures and addresses; none with --like or --duplicates."""
    where: str | None = None
    """Only among these: "date >= 2024 and caption like '%dog%'" (docs/find.md)."""
    top: int = 20
    """How many at most."""
    cutoff: str = "auto"
    """Leave out what is nearer to the query by less than this many standard deviations than unrelated queries are; auto
    is 3, 2 for pictures alone, and none for --like alone; none leaves out nothing."""
    like: str | None = None
    """More like this picture of the index: its id or its path."""
    duplicates: bool = False
    """Groups of pictures that look alike, the best of each first: most pixels, most bytes, oldest date."""
    threshold: float = 0.97
    """Of --duplicates: the least cosine of any two pictures of a group."""
    exact: bool = False
    """Of --duplicates: files of equal bytes alone."""
    explain: bool = False
    """What the query retrieves from the pictures as a Hopfield memory: the associated pictures with their weights."""
    beta: float | None = None
    """Of --explain: small averages over all pictures, large takes the nearest; left out, the model's own, else 8."""
    json: bool = False
    """Print one JSON object."""
    paths: bool = False
    """Print the paths alone, for pipes; of --duplicates all of each group, an empty line between groups."""
    null: bool = False
    """End each path with a NUL instead of a line feed; also -0."""
    copy_to: Path | None = None
    """Copy what is found into this folder; nothing there is overwritten."""
    sheet: Path | None = None
    """Write a contact sheet, one HTML file."""
    open: bool = False
    """Show a contact sheet in the browser."""
    model: str | None = None
    """Which of the index's models, by its name or by what it is loaded from; the first when left out."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    cache: CacheOptions = field(default_factory=CacheOptions)


def read(words: Sequence[str]) -> Options:
    """The options, and the terms after the first ``--``, whatever these begin with."""
    place = list(words).index("--") if "--" in words else len(words)
    before = ["--null" if word == "-0" else word for word in words[:place]]
    for previous, word in pairwise(["", *before]):
        is_value = previous.startswith("--") and _NUMBER(word)
        if word[:1] == "-" and word[1:2].isalnum() and word != "-h" and not is_value:
            raise InputError(f"{word}: put terms to subtract after --, as in: cloob search IDX beach -- {word}")
    options = parse(Options, before, "cloob search")
    return dataclasses.replace(options, query=(*options.query, *words[place + 1 :]))


def check(options: Options) -> None:
    alone = [("duplicates", other) for other in ("query", "like", "explain", "sheet", "open", "top", "cutoff")]
    alone += [("explain", other) for other in ("paths", "copy_to", "sheet", "open", "cutoff")]
    exclusive(options, ("paths", "json"), ("exact", "threshold"), *alone)
    goes_with(options, {"threshold": "duplicates", "exact": "duplicates", "null": "paths", "beta": "explain"})
    if not (options.duplicates or options.query or options.like):
        raise InputError('nothing to search for: give words ("a red bird"), a picture or --like ID')
    if not 1 <= options.top <= _MAX_TOP:
        raise InputError(f"--top is {options.top}; 1 to {_MAX_TOP:,} is wanted")
    if not 0 < options.threshold <= 1:
        raise InputError(f"--threshold is {options.threshold}; a cosine above 0, at most 1, is wanted")
    if options.sheet is not None:
        check_out("--sheet", options.sheet, HTML)
    _cutoff(options.cutoff)
    check_index(options.index)


def _cutoff(text: str) -> float | str | None:
    """``auto``, ``none`` (None) or a number."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--cutoff is {text!r}; auto, none or a number such as 3 is wanted") from None


def run(options: Options) -> int:
    """Searches; 1 where something found could not be copied."""
    from cloob.search.index import Index
    from cloob.search.query import Query, Term
    from cloob.search.where import parse as parse_filter

    query = Query.parse(options.query)
    with Index.open(options.index, model=options.model) as index:
        if options.where is not None:
            parse_filter(options.where, index.columns())
        if options.duplicates:
            return _duplicates(index, options)
        if options.like is not None:
            query = Query((Term(_find_item(index, options.like), "item"), *query.terms))
        if query.needs_model:
            index.embedder(device=options.device)
        if options.explain:
            return _explain(index, options, query)
        cutoff = _cutoff(options.cutoff)
        if cutoff == "auto" and not query.needs_model:
            cutoff = None  # what is like a picture of the index is asked for in order
        results = index.search(query, top=options.top, where=options.where, cutoff=cutoff)  # type: ignore[arg-type]
        return _show(index, options, results)


def _find_item(index: Index, like: str) -> int:
    """The id of a picture of the index by its id or its path."""
    from cloob.search.where import equals

    if like.isascii() and like.isdigit() and index.items([int(like[:18])]):
        return int(like[:18])
    for path in dict.fromkeys((like, os.path.abspath(like))):  # noqa: PTH100 - links stay as the index has them
        ids = index.store.ids(equals("path", path), limit=1)
        if len(ids):
            return int(ids[0])
    raise InputError(f"--like {like}: no picture of {index.store.address} has this id or path")


def _show(index: Index, options: Options, results: Results) -> int:
    items = [hit.item for hit in results.hits]
    if options.json:
        facts = {name: getattr(results, name) for name in ("model", "searched", "cut")}
        hits = list(map(_hit_dict, results.hits))
        print(json.dumps({"query": list(options.query)} | facts | {"hits": hits}))
    elif options.paths:
        _print_paths([items], null=options.null)
    else:
        _print_hits(results)
    code = _copy(index, items, options.copy_to)
    if options.sheet is not None or options.open:
        _write_sheet(index, options, results)
    if results.hits and not options.json and not options.paths:
        hint(["search", index.store.address, "--like", str(items[0].id), "--open"])
    if not results.hits:
        said = f"nothing fits among {results.searched:,} pictures; --cutoff none shows the nearest all the same"
        if not results.searched:
            why = index.view(options.where, results.model).why_none()
            said = f"no picture to search: {why}"
        elif not results.cut:
            said = "there is no other picture to search"
        print(f"cloob: {said}", file=sys.stderr)
    return code


def _print_hits(results: Results) -> None:
    to_person = sys.stdout.isatty()
    for hit in results.hits:
        margin, item = "" if hit.margin is None else f"{hit.margin:.1f}", hit.item
        if to_person:
            print(_aligned(f"{hit.score:6.3f}  {margin:>5}", item))
        else:
            print("\t".join((f"{hit.score:.4f}", margin, str(item.id), printable(item.path), _first_line(item))))
    if results.cut and results.hits and to_person:
        print(f"{results.cut} more are below the cutoff (--cutoff none shows them)", file=sys.stderr)


def _write_sheet(index: Index, options: Options, results: Results) -> None:
    import tempfile
    import webbrowser

    from cloob.search.export import write_sheet

    faults: list[str] = []

    def picture(item: Item) -> bytes | None:
        try:
            return index.picture(item.id)
        except (InputError, OSError) as error:
            faults.append(message(error))
            return None

    path = options.sheet or Path(tempfile.mkdtemp(prefix="cloob-")) / "sheet.html"
    title = " ".join(options.query) or f"like {options.like}"
    said = f"{len(results.hits)} of {results.searched:,} pictures, by {results.model}"
    write_sheet(path, title, said, results.hits, picture)
    print(f"cloob: contact sheet: {path}", file=sys.stderr)
    if faults:
        print(f"cloob: {counted(len(faults), 'pictures')} cannot be shown: {faults[0]}", file=sys.stderr)
    if options.open and not webbrowser.open(path.absolute().as_uri()):
        print("cloob: no browser could be started; open the file yourself", file=sys.stderr)


def _copy(index: Index, items: Sequence[Item], folder: Path | None) -> int:
    if folder is None:
        return 0
    return 1 if put(index, ((item, folder) for item in items), folder, copy=True, alone=True) else 0


def _duplicates(index: Index, options: Options) -> int:
    groups = index.duplicates(options.threshold, exact=options.exact, where=options.where)
    items = [[hit.item for hit in group] for group in groups]
    rows = list(map(_twins, groups))
    if options.json:
        print(json.dumps({"threshold": None if options.exact else options.threshold, "groups": rows}))
    elif options.paths:
        _print_paths(items, null=options.null)
    elif groups:
        print("\n\n".join("\n".join(map(_twin_line, group)) for group in rows))
    every = [item for group in items for item in group]
    same = [n for n in Counter(item.content for item in every).values() if n > 1]
    said = f"{counted(len(same), 'groups')} equal byte by byte, {counted(sum(same), 'files')}"
    if not options.exact:
        said = f"{counted(len(groups), 'groups')} of look-alikes, {counted(len(every), 'pictures')} ({said})"
    if not groups:
        said = "no files are equal" if options.exact else f"no look-alikes (cosine {options.threshold:g} and above)"
    print(f"cloob: {said}", file=sys.stderr)
    return _copy(index, every, options.copy_to)


def _twins(group: Sequence[Hit]) -> list[dict[str, Any]]:
    """A group as JSON has it; ``equal`` is the id of the picture before it that has the same bytes."""
    firsts: dict[str, int] = {}
    rows = []
    for hit in group:
        first = firsts.setdefault(hit.item.content, hit.item.id)
        equal = None if first == hit.item.id else first
        rows.append({"cosine": round(hit.score, 6), "equal": equal, **_item_dict(hit.item)})
    return rows


def _twin_line(row: dict[str, Any]) -> str:
    equal = "" if row["equal"] is None else f"\tsame bytes as {row['equal']}"
    size = f"{row['width']}x{row['height']}\t{row['bytes']}"
    return f"{row['cosine']:.4f}\t{size}\t{row['id']}\t{printable(row['path'])}{equal}"


def _explain(index: Index, options: Options, query: Query) -> int:
    if options.beta is None:  # it is the model's own
        index.encoder(device=options.device)
    found = index.explain(query, beta=options.beta, top=options.top, where=options.where)
    if options.json:
        facts = ("beta", "memory", "collection", "effective", "agreement", "model")
        pictures = [{"weight": p.weight, "score": p.score, **_item_dict(p.item)} for p in found.pictures]
        nearest = list(map(_hit_dict, found.nearest))
        print(json.dumps({name: getattr(found, name) for name in facts} | {"pictures": pictures, "nearest": nearest}))
        return 0
    part = "" if found.memory == found.collection else f" (the nearest of {found.collection:,})"
    print(f"β = {found.beta:g}: of {found.memory:,} pictures{part} some {found.effective:,.1f} take part;")
    print(f"what they make has a cosine of {found.agreement:.3f} with the query. By weight:")
    for picture in found.pictures:
        print(_aligned(f"{picture.weight:7.2%}  {picture.score:6.3f}", picture.item))
    print("Nearest to what was retrieved:")
    for hit in found.nearest:
        print(_aligned(f"{'':9}{hit.score:6.3f}{'':7}", hit.item))
    like = [] if options.like is None else ["--like", options.like]
    terms = ["--", *options.query] if options.query else []
    hint(["search", index.store.address, *like, "--explain", "--beta", f"{found.beta * 4:g}", *terms])
    return 0


def _hit_dict(hit: Hit) -> dict[str, Any]:
    margin = None if hit.margin is None else round(hit.margin, 4)
    return {"score": round(hit.score, 6), "margin": margin, **_item_dict(hit.item)}


def _item_dict(item: Item) -> dict[str, Any]:
    facts = ("id", "path", "source", "caption", "date", "width", "height", "bytes")
    return {name: getattr(item, name) for name in facts} | {"columns": dict(item.columns)}


def _aligned(numbers: str, item: Item) -> str:
    """A line of numbers, id, path and the caption's first line, cut to the width of a terminal."""
    before = f"{numbers}  {item.id:>6}  {printable(item.path)}  "
    caption, room = _first_line(item), shutil.get_terminal_size().columns - len(before)
    if sys.stdout.isatty() and len(caption) > room:
        caption = f"{caption[: room - 1]}…" if room > 1 else ""
    return (before + caption).rstrip()


def _first_line(item: Item) -> str:
    return printable((item.caption or "").strip().partition("\n")[0].rstrip())


def _print_paths(groups: Sequence[Sequence[Item]], *, null: bool) -> None:
    """Paths as the file system has them, byte by byte; an empty one between groups."""
    end = b"\0" if null else b"\n"
    sys.stdout.flush()
    sys.stdout.buffer.write(end.join(b"".join(os.fsencode(item.path) + end for item in group) for group in groups))
    sys.stdout.buffer.flush()
