"""An index to work on (one that is there, or a temporary one of pictures that are in none), and copies out of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import cloob
from cloob.commands.console import DecodeOptions, check_there, progress, refuse, say
from cloob.errors import InputError, message, printable

if TYPE_CHECKING:
    from cloob.models.encoder import DualEncoder
    from cloob.search.build import Summary
    from cloob.search.records import Item, Precision

INDEX_FILE = "index.sqlite"
_BELONGING = (".txt", ".caption", ".xmp", ".aae", ".mov")  # captions, edits, and the film of a live photo


def check_index(address: str) -> None:
    """Refuses a place without an index; of a database the server is asked later."""
    path = Path(address)
    there = "holds no index" if path.is_dir() else "is a file" if path.exists() else "no such folder"
    found = (path / ".cloob" / INDEX_FILE).is_file()  # by `cloob find`
    refuse({f"{address}: is a folder of pictures; its index is {path / '.cloob'}": found})
    free = not any(path.iterdir()) if path.is_dir() else not path.exists()
    said = f"{address}: {there}; cloob index SRC --model M --out {address if free else 'NAME.idx'} makes one"
    refuse({said: not address.startswith(("postgresql://", "postgres://")) and not (path / INDEX_FILE).is_file()})


def check_source(source: str, model: str | None) -> None:
    """Refuses a source that is not there, and pictures in no index without a model to embed them."""
    from cloob.models.source import check_source as check_model

    if "://" not in source and not (Path(source) / INDEX_FILE).is_file():
        check_there(source)
        refuse({"no model given: --model names a run folder, or NAME/TAG of open_clip": model is None})
        check_model(str(model))


@contextmanager
def opened(
    source: str | Path, model: str | DualEncoder | None, machine: DecodeOptions, precision: Precision | None = None
) -> Iterator[tuple[cloob.Index, int]]:
    """An index of a source, and how many of its pictures, folders and shards could not be read; some are named.

    Pictures are embedded into an index that is gone at the end. The model is one of an index, by name or by what it is
    loaded from; or for pictures what ``load_model`` takes, or a loaded one.
    """
    from cloob.search.address import is_there
    from cloob.search.update import UpdateOptions

    if is_there(source):
        with cloob.Index.open(source, model=model if isinstance(model, str) else None) as index:
            yield index, 0
        return
    options = UpdateOptions(model, device=machine.device, precision=precision, workers=machine.threads())
    with tempfile.TemporaryDirectory(prefix="cloob-") as folder, cloob.Index.create(Path(folder) / "index") as index:
        with progress() as update:
            done = index.update([source], options, progress=partial(update, "pictures"))
        report_left_out(done)
        yield index, done.faults.total() + done.unread


def report_left_out(summary: Summary) -> None:
    """Names what could not be read, and what else of the sources is not in the index."""
    from cloob.search.scan.collection import EXAMPLES

    for kind in (summary.unreadable, summary.left_out):
        for reason, count in kind.counts.most_common():
            examples = kind.examples[reason]
            more = ", …" if count > len(examples) >= EXAMPLES else ""
            say(f"{count:,} × {reason}: {', '.join(map(printable, examples))}{more}")


def copy(
    index: cloob.Index, items: Iterable[Item], root: Path | None, below: Mapping[int, str] = {}, *, move: bool = False
) -> int:
    """Copies pictures into a folder, or one below it by their id; nothing is overwritten. 1 where one could not be.

    With ``move`` they are moved, captions and edits beside them too, and ``root/moved.jsonl`` lists old and new paths.
    """
    if root is None:
        return 0
    done = failed = there = 0
    past, listed = "moved" if move else "copied", cache(_by_stem)
    for item in items:
        placed: list[tuple[Path, Path]] = []
        try:
            placed.extend(_place(index, item, (root / below.get(item.id, "")).absolute(), listed if move else None))
            done, there = done + bool(placed), there + (not placed)
        except (OSError, InputError) as error:
            say(f"{printable(item.path)} is not {past}: {message(error).removeprefix(f'{item.path}: ')}")
            failed += 1
        if move and placed:
            with (root / "moved.jsonl").open("a") as log:
                log.writelines(json.dumps({"old": str(old), "new": str(new)}) + "\n" for old, new in placed)
    also = f", {there} were there" if there else ""
    also += f", {failed} could not be {past}" if failed else ""
    say(f"{done} {past} to {root}{also}")
    return 1 if failed else 0


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by their names without the last suffix."""
    files: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        files.setdefault(path.stem, []).append(path)
    return files


def _place(
    index: cloob.Index, item: Item, folder: Path, listed: Callable[[Path], dict[str, list[Path]]] | None
) -> Iterator[tuple[Path, Path]]:
    """Copies a picture to ``a.jpg``, ``a-2.jpg`` and so on, unless it is there; yields old and new paths.

    With ``listed``, which gives the files of a folder by stem, it is moved, and the files of its name that belong to
    it move along. Where another picture has that name, they are copied.
    """
    from cloob.data.source import IMAGE_SUFFIXES, RAW_SUFFIXES
    from cloob.files import write_whole

    content, source = index.picture(item.id), Path(item.path).absolute()  # an InputError where it has changed
    if listed and (source.is_symlink() or not source.is_file()):
        raise InputError("it is no file of its own (in a container, or a link)")
    if listed and source.is_relative_to(folder):
        return
    alike, stems = listed(source.parent) if listed else {}, {source.stem, source.name}
    named = [path for stem in stems for path in alike.get(stem, ()) if path.exists()]
    belonging = [path for path in named if path.suffix.lower() in _BELONGING]
    shared = any(path != source and path.suffix.lower() in (*IMAGE_SUFFIXES, *RAW_SUFFIXES) for path in named)
    name = Path(folder_name(re.split(r"/|\\|::", item.path)[-1][-200:]))  # of a file, or a member of a container
    marks = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    for target in (folder / f"{name.stem}{mark}{name.suffix}" for mark in marks):
        if not listed and target.is_file() and target.read_bytes() == content:
            return
        renamed = {source.stem: target.stem, source.name: target.name}  # a.xmp and a.jpg.xmp belong to a.jpg
        pairs = [(source, target), *((path, folder / f"{renamed[path.stem]}{path.suffix}") for path in belonging)]
        if not any(os.path.lexists(new) for _, new in pairs):
            break
    folder.mkdir(parents=True, exist_ok=True)
    for old, new in pairs:
        if listed:
            (shutil.copy2 if shared and old != source else shutil.move)(old, new)
        else:
            write_whole(new, content)
            if old.is_file():  # of a container there is none
                shutil.copystat(old, new)
        yield old, new


def folder_name(label: str) -> str:
    name = re.sub(r"[/\\]", "_", printable(label)).strip()
    return "_" if name in ("", ".", "..") else name[:200]
