"""Copies and moves of pictures, under names that are free: nothing is overwritten."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.errors import InputError, message, printable

if TYPE_CHECKING:
    from cloob.search.index import Index
    from cloob.search.records import Item

_MOVED = "moved.jsonl"
_BELONGING = ("xmp", "aae", "mov")  # edits, and the film of a live photo; captions besides


def put(index: Index, items: Iterable[tuple[Item, Path | None]], root: Path, *, copy: bool, alone: bool = False) -> int:
    """Puts each picture into its folder, if it has one, and says on stderr what became of them.

    Captions and edits go along unless the picture goes ``alone``. Of moves ``root`` lists old and new paths.

    Returns:
        How many could not be put there.
    """
    done = failed = stayed = there = 0
    past = "copied" if copy else "moved"
    for item, folder in items:
        if folder is None:
            stayed += 1
            continue
        pairs = []
        try:
            for old, new in _place(index, item, folder, copy=copy, alone=alone):
                pairs.append({"old": str(old), "new": str(new)})
            done, there = done + bool(pairs), there + (not pairs)
        except (OSError, InputError) as error:
            said = error.strerror if isinstance(error, OSError) else message(error).removeprefix(f"{item.path}: ")
            print(f"cloob: {printable(item.path)} is not {past}: {said}", file=sys.stderr)
            failed += 1
        if pairs and not copy:
            with (root / _MOVED).open("a") as log:
                log.writelines(f"{json.dumps(pair)}\n" for pair in pairs)
    also = f", {there} were there" if there else ""
    also += f", {stayed} fit no label and stay" if stayed else ""
    also += f", {failed} could not be {past}" if failed else ""
    also += f"; {root / _MOVED} lists old and new paths" if done and not copy else ""
    print(f"cloob: {done} {past} to {root}{also}", file=sys.stderr)
    return failed


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    name = re.sub(r"[/\\]", "_", printable(label)).strip()
    return "_" if name in ("", ".", "..") else name[:200]


def _place(index: Index, item: Item, folder: Path, *, copy: bool, alone: bool) -> Iterator[tuple[Path, Path]]:
    """Moves or copies a picture as it was indexed; yields old and new paths, none if it is there already."""
    from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS

    endings = () if alone else (*CAPTION_EXTENSIONS, *_BELONGING)
    source, folder = Path(item.path).absolute(), folder.absolute()
    has_file = source.is_file() and not source.is_symlink()
    if not has_file and not copy:
        raise InputError("it is no file of its own (in a container, a link, or gone)")
    content = index.picture(item.id)  # an InputError where it has changed
    if has_file and source.resolve().is_relative_to(folder.resolve()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for target in _free_names(folder, item.path):
        if copy and target.is_file() and target.read_bytes() == content:
            return
        if not any(map(os.path.lexists, [target, *_companions(target, endings)])):
            break
    if has_file:
        _transfer(source, target, copy=copy)
    else:
        target.write_bytes(content)
    yield source, target
    shared = any(file.is_file() for file in _beside(source, IMAGE_EXTENSIONS) if file != source)
    companions = zip(_companions(source, endings), _companions(target, endings), strict=True)
    files = {old.stat().st_ino: (old, new) for old, new in companions if old.is_file()}  # a.mov may also be a.MOV
    for old, new in files.values():
        _transfer(old, new, copy=copy or (shared and not old.name.startswith(source.name)))
        yield old, new


def _transfer(old: Path, new: Path, *, copy: bool) -> None:
    """Moves or copies a file; where that fails, no copy is left."""
    try:
        (shutil.copy2 if copy else shutil.move)(old, new)
    except BaseException:
        if old.exists():
            new.unlink(missing_ok=True)
        raise


def _companions(picture: Path, endings: Sequence[str]) -> list[Path]:
    """The files that belong to a picture if they lie beside it."""
    edits = [picture.with_name(f"{picture.name}{ending}") for ending in (".xmp", ".XMP")] if endings else []
    return _beside(picture, endings) + edits


def _beside(file: Path, endings: Sequence[str]) -> list[Path]:
    """The files of the same stem with some endings, in small letters and in capitals."""
    stem = os.path.splitext(file)[0]  # noqa: PTH122
    return [Path(f"{stem}.{each}") for ending in endings for each in (ending, ending.upper())]


def _free_names(folder: Path, path: str) -> Iterator[Path]:
    """``a.jpg``, ``a-2.jpg`` and so on, for a path or a member of a container; none leaves the folder."""
    name = printable(re.split(r"/|\\|::", path)[-1]).strip()[-200:]
    name = "picture" if name in ("", ".", "..") else name
    yield folder / name
    stem, dot, suffix = name.rpartition(".")
    for number in itertools.count(2):
        yield folder / (f"{stem}-{number}{dot}{suffix}" if stem else f"{name}-{number}")
