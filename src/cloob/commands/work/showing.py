"""What a search or a classification shows: lines for people and pipes, copies, and pictures in a terminal."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cloob.commands.steps import say_next
from cloob.errors import InputError, message, printable
from cloob.search.records import Hit, Item


def name_of(path: str) -> str:
    """The last part of a path, of a member of a container too, as a file name that leaves no folder."""
    name = printable(re.split(r"/|\\|::", path)[-1]).strip()
    return "picture" if name in ("", ".", "..") else name[-200:]


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    name = re.sub(r"[/\\]", "_", printable(label)).strip()
    return "_" if name in ("", ".", "..") else name[:200]


def as_dict(hit: Hit) -> dict[str, Any]:
    """A hit as JSON has it."""
    item = hit.item
    margin = None if hit.margin is None else round(hit.margin, 4)
    return {"score": round(hit.score, 6), "margin": margin, **item_dict(item)}


def item_dict(item: Item) -> dict[str, Any]:
    """A picture as JSON has it."""
    facts = ("id", "path", "source", "caption", "date", "width", "height", "bytes")
    return {name: getattr(item, name) for name in facts} | {"columns": dict(item.columns)}


def hit_line(hit: Hit, *, aligned: bool) -> str:
    """Score, margin, id, path and the caption's first line; tab-separated for pipes."""
    margin = "" if hit.margin is None else f"{hit.margin:.1f}"
    if not aligned:
        path, caption = printable(hit.item.path), _first_line(hit.item)
        return "\t".join((f"{hit.score:.4f}", margin, str(hit.item.id), path, caption))
    return with_caption(f"{hit.score:6.3f}  {margin:>5}", hit.item)


def with_caption(numbers: str, item: Item) -> str:
    """A line of numbers, id, path and the caption's first line, cut to the width of a terminal."""
    before = f"{numbers}  {item.id:>6}  {printable(item.path)}  "
    caption, room = _first_line(item), shutil.get_terminal_size().columns - len(before)
    if sys.stdout.isatty() and len(caption) > room:
        caption = f"{caption[: room - 1]}…" if room > 1 else ""
    return (before + caption).rstrip()


def _first_line(item: Item) -> str:
    return printable((item.caption or "").strip().partition("\n")[0].rstrip())


def print_paths(groups: Sequence[Sequence[Item]], *, null: bool) -> None:
    """Paths as the file system has them, byte by byte; an empty one between groups."""
    end = b"\0" if null else b"\n"
    sys.stdout.flush()
    sys.stdout.buffer.write(end.join(b"".join(os.fsencode(item.path) + end for item in group) for group in groups))
    sys.stdout.buffer.flush()


def copy_all(items: Sequence[Item], folder: Path, picture: Callable[[int], bytes]) -> int:
    """Copies pictures into a folder; what is there stays, and a picture that is there already is not copied again.

    Returns:
        The exit code: 1 where one could not be read or written, which stderr names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from None
    copied = there = failed = 0
    for item in items:
        try:
            fresh = write_new(folder, name_of(item.path), picture(item.id))
        except (InputError, OSError) as error:
            print(f"cloob: {printable(item.path)} is not copied: {message(error)}", file=sys.stderr)
            failed += 1
            continue
        copied, there = copied + fresh, there + (not fresh)
    also = f", {there} were there" if there else ""
    also += f", {failed} could not be copied" if failed else ""
    print(f"cloob: {copied} copied to {folder}{also}", file=sys.stderr)
    return 1 if failed else 0


def write_new(folder: Path, name: str, content: bytes) -> bool:
    """Writes a file under a name that is free; False where one of these names holds the same bytes already."""
    for number in range(1, 10_000):
        path = free_name(folder, name, number)
        try:
            file = path.open("xb")
        except FileExistsError:
            if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
                return False
            continue
        try:
            with file:
                file.write(content)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return True
    raise InputError(f"{folder / name}: 10,000 files of this name are there")


def free_name(folder: Path, name: str, number: int) -> Path:
    """The first, second, … name to try: ``a.jpg``, ``a-2.jpg``."""
    stem, dot, suffix = name.rpartition(".")
    if number == 1:
        return folder / name
    return folder / (f"{stem}-{number}{dot}{suffix}" if stem else f"{name}-{number}")


def hint(words: Sequence[str | Path]) -> None:
    """Says the next command, to a person: who reads the output of these by a program reads their stderr as well.

    Args:
        words: What comes after ``cloob``.
    """
    if sys.stdout.isatty() and sys.stderr.isatty():
        say_next(words)
