"""Searches an index as ``cloob search`` was asked to, and shows what there is."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import webbrowser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloob.commands.finding import SearchArguments, read_cutoff
from cloob.commands.work.showing import as_dict, copy_all, hint, hit_line, item_dict, print_paths, with_caption
from cloob.errors import InputError, counted, message, printable
from cloob.search import terminal
from cloob.search.find import read_filter, why_none
from cloob.search.index import Index
from cloob.search.query import Query, Term
from cloob.search.records import Hit, Item, Results
from cloob.search.where import equals, parse


def run(arguments: SearchArguments, words: Sequence[str]) -> int:
    """Searches; returns the exit code."""
    arguments.cache.use()
    query = Query.parse(words)
    with Index.open(arguments.index, model=arguments.model) as index:
        if arguments.where is not None:
            parse(arguments.where, index.columns())
        if arguments.duplicates:
            return _duplicates(index, arguments)
        if arguments.like is not None:
            query = Query((Term(find_item(index, arguments.like), "item"), *query.terms))
        if query.needs_model:
            index.embedder(device=arguments.device)
        if arguments.explain:
            return _explain(index, arguments, query, words)
        cutoff = read_cutoff(arguments.cutoff)
        if cutoff == "auto" and not query.needs_model:
            cutoff = None  # what is like a picture of the index is asked for in order
        results = index.search(query, top=arguments.top, where=arguments.where, cutoff=cutoff)  # type: ignore[arg-type]
        return _show(index, arguments, words, results)


def find_item(index: Index, like: str) -> int:
    """The id of a picture of the index by its id or its path; InputError where there is none."""
    if like.isascii() and like.isdigit() and index.items([int(like[:18])]):
        return int(like[:18])
    whole = os.path.abspath(like)  # noqa: PTH100 - links stay as the index has them
    for path in dict.fromkeys((like, whole)):
        ids = index.store.ids(equals("path", path), limit=1)
        if len(ids):
            return int(ids[0])
    raise InputError(f"--like {like}: no picture of {index.store.address} has this id or path")


def _show(index: Index, arguments: SearchArguments, words: Sequence[str], results: Results) -> int:
    title = " ".join(words) or f"like {arguments.like}"
    items = [hit.item for hit in results.hits]
    if arguments.json:
        found = {"query": list(words), "model": results.model, "searched": results.searched, "cut": results.cut}
        print(json.dumps(found | {"hits": [as_dict(hit) for hit in results.hits]}))
    elif arguments.paths:
        print_paths([items], null=arguments.null)
    else:
        _print_hits(index, results)
    code = copy_all(items, arguments.copy_to, index.picture) if arguments.copy_to is not None else 0
    if arguments.sheet is not None or arguments.open:
        _sheet(index, arguments, title, results)
    if not results.hits:
        print(f"cloob: {nothing(index, arguments.where, results)}", file=sys.stderr)
    elif not arguments.json and not arguments.paths:
        hint(["search", index.store.address, "--like", str(items[0].id), "--open"])
    return code


def nothing(index: Index, where: str | None, results: Results) -> str:
    """Why nothing was found."""
    if not results.searched:
        return f"no picture to search: {why_none(index.store, results.model, read_filter(index, where))}"
    if not results.cut:
        return "there is no other picture to search"
    return f"nothing fits among {results.searched:,} pictures; --cutoff none shows the nearest all the same"


def _print_hits(index: Index, results: Results) -> None:
    how = terminal.protocol(os.environ, sys.stdout.isatty())
    for hit in results.hits:
        if how is not None:
            print(_shown(_picture(index, hit.item, []), how))
        print(hit_line(hit, aligned=sys.stdout.isatty()))
    if results.cut and results.hits and sys.stdout.isatty():
        print(f"{results.cut} more are below the cutoff (--cutoff none shows them)", file=sys.stderr)


def _shown(data: bytes | None, how: terminal.Protocol) -> str:
    """A picture for the terminal, or why there is none."""
    from cloob.pictures import Unreadable  # Pillow

    try:
        return terminal.shown(data, how) if data is not None else "(not readable any more)"
    except Unreadable as error:
        return printable(f"({error.reason}: {error.detail})")


def _picture(index: Index, item: Item, faults: list[str]) -> bytes | None:
    """A picture's file; None where it cannot be read, and why among the faults."""
    try:
        return index.picture(item.id)
    except (InputError, OSError) as error:
        faults.append(message(error))
        return None


def _sheet(index: Index, arguments: SearchArguments, title: str, results: Results) -> None:
    from cloob.search.sheet import write_sheet  # Pillow

    path = arguments.sheet
    if path is None:
        handle, name = tempfile.mkstemp(prefix="cloob-", suffix=".html")
        os.close(handle)
        path = Path(name)
    said = f"{len(results.hits)} of {results.searched:,} pictures, by {results.model}"
    faults: list[str] = []
    write_sheet(path, title, said, results.hits, lambda item: _picture(index, item, faults))
    print(f"cloob: contact sheet: {path}", file=sys.stderr)
    if faults:
        print(f"cloob: {counted(len(faults), 'pictures')} cannot be shown: {faults[0]}", file=sys.stderr)
    if arguments.open and not webbrowser.open(path.absolute().as_uri()):
        print("cloob: no browser could be started; open the file yourself", file=sys.stderr)


def _duplicates(index: Index, arguments: SearchArguments) -> int:
    groups = index.duplicates(arguments.threshold, exact=arguments.exact, where=arguments.where)
    items = [[hit.item for hit in group] for group in groups]
    rows = list(map(_twins, groups))
    if arguments.json:
        print(json.dumps({"threshold": None if arguments.exact else arguments.threshold, "groups": rows}))
    elif arguments.paths:
        print_paths(items, null=arguments.null)
    elif groups:
        print("\n\n".join("\n".join(map(_twin_line, group)) for group in rows))
    same = [n for n in Counter(item.content for group in items for item in group).values() if n > 1]
    said = f"{counted(len(same), 'groups')} equal byte by byte, {counted(sum(same), 'files')}"
    if not arguments.exact:
        pictures = counted(sum(map(len, groups)), "pictures")
        said = f"{counted(len(groups), 'groups')} of look-alikes, {pictures} ({said})"
    if not groups:
        said = "no files are equal" if arguments.exact else f"no look-alikes (cosine {arguments.threshold:g} and above)"
    print(f"cloob: {said}", file=sys.stderr)
    if arguments.copy_to is not None:
        return copy_all([item for group in items for item in group], arguments.copy_to, index.picture)
    return 0


def _twins(group: Sequence[Hit]) -> list[dict[str, Any]]:
    """A group as JSON has it; ``equal`` is the id of the picture before it that has the same bytes."""
    firsts: dict[str, int] = {}
    equals = [firsts.setdefault(hit.item.content, hit.item.id) for hit in group]
    return [
        {"cosine": round(hit.score, 6), "equal": None if equal == hit.item.id else equal, **item_dict(hit.item)}
        for hit, equal in zip(group, equals, strict=True)
    ]


def _twin_line(row: dict[str, Any]) -> str:
    equal = "" if row["equal"] is None else f"same bytes as {row['equal']}"
    size = f"{row['width']}x{row['height']}"
    facts = (f"{row['cosine']:.4f}", size, str(row["bytes"]), str(row["id"]), printable(row["path"]), equal)
    return "\t".join(facts).rstrip("\t")


def _explain(index: Index, arguments: SearchArguments, query: Query, words: Sequence[str]) -> int:
    if arguments.beta is None:  # it is the model's own
        index.encoder(device=arguments.device)
    found = index.explain(query, beta=arguments.beta, top=arguments.top, where=arguments.where)
    if arguments.json:
        facts = ("beta", "memory", "collection", "effective", "agreement", "model")
        pictures = [{"weight": p.weight, "score": p.score, **item_dict(p.item)} for p in found.pictures]
        nearest = [as_dict(hit) for hit in found.nearest]
        print(json.dumps({name: getattr(found, name) for name in facts} | {"pictures": pictures, "nearest": nearest}))
        return 0
    part = "" if found.memory == found.collection else f" (the nearest of {found.collection:,})"
    print(f"β = {found.beta:g}: of {found.memory:,} pictures{part} some {found.effective:,.1f} take part;")
    print(f"what they make has a cosine of {found.agreement:.3f} with the query. By weight:")
    for picture in found.pictures:
        print(with_caption(f"{picture.weight:7.2%}  {picture.score:6.3f}", picture.item))
    print("Nearest to what was retrieved:")
    for hit in found.nearest:
        print(with_caption(f"{'':9}{hit.score:6.3f}{'':7}", hit.item))
    like = [] if arguments.like is None else ["--like", arguments.like]
    behind = ["--", *words] if words else []
    hint(["search", index.store.address, *like, "--explain", "--beta", f"{found.beta * 4:g}", *behind])
    return 0
