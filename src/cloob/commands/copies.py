"""Copies and moves of pictures, under names that are free: nothing is overwritten."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.errors import InputError, message, printable

if TYPE_CHECKING:
    from cloob.search.index import Index
    from cloob.search.records import Item


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    name = re.sub(r"[/\\]", "_", printable(label)).strip()
    return "_" if name in ("", ".", "..") else name[:200]


def copy_all(index: Index, items: Sequence[Item], folder: Path) -> int:
    """Copies pictures into a folder, but for those that are there already.

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
            fresh = _write_new(folder, _file_name(item.path), index.picture(item.id))
        except (InputError, OSError) as error:
            print(f"cloob: {printable(item.path)} is not copied: {message(error)}", file=sys.stderr)
            failed += 1
            continue
        copied, there = copied + fresh, there + (not fresh)
    also = f", {there} were there" if there else ""
    also += f", {failed} could not be copied" if failed else ""
    print(f"cloob: {copied} copied to {folder}{also}", file=sys.stderr)
    return 1 if failed else 0


def place(index: Index, item: Item, folder: Path, *, copy: bool) -> Iterator[tuple[Path, Path]]:
    """Moves or copies a picture as it was indexed, with its captions and edits; yields old and new paths as it goes.

    Nothing is done, or yielded, where it is there already.
    """
    from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS

    endings = (*CAPTION_EXTENSIONS, "xmp", "aae", "mov")  # captions, edits, and the film of a live photo
    source, folder = Path(item.path).absolute(), folder.absolute()
    has_file = source.is_file() and not source.is_symlink()
    if not has_file and not copy:
        raise InputError("it is no file of its own (in a container, a link, or gone)")
    content = index.picture(item.id)  # an InputError where it has changed
    if has_file and source.resolve().is_relative_to(folder.resolve()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = _free_names(folder, source.name if has_file else _file_name(item.path))
    for target in names:
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
    return _beside(picture, endings) + [picture.with_name(f"{picture.name}{ending}") for ending in (".xmp", ".XMP")]


def _beside(file: Path, endings: Sequence[str]) -> list[Path]:
    """The files of the same stem with some endings, in small letters and in capitals."""
    stem = os.path.splitext(file)[0]  # noqa: PTH122
    return [Path(f"{stem}.{each}") for ending in endings for each in (ending, ending.upper())]


def _file_name(path: str) -> str:
    """The last part of a path, of a member of a container too, as a file name that leaves no folder."""
    name = printable(re.split(r"/|\\|::", path)[-1]).strip()
    return "picture" if name in ("", ".", "..") else name[-200:]


def _write_new(folder: Path, name: str, content: bytes) -> bool:
    """Writes a file under a free name; False where a file of such a name holds the same bytes already."""
    for path in _free_names(folder, name):
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return False
        if not os.path.lexists(path):
            path.write_bytes(content)
            break
    return True


def _free_names(folder: Path, name: str) -> Iterator[Path]:
    """The names to try in turn: ``a.jpg``, ``a-2.jpg`` and so on."""
    yield folder / name
    stem, dot, suffix = name.rpartition(".")
    for number in itertools.count(2):
        yield folder / (f"{stem}-{number}{dot}{suffix}" if stem else f"{name}-{number}")
